"""One count of heads and dimensions, held to the keys and values that each family's real layers make."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from lminf_eval.config.model_shape import ModelShape
from lminf_eval.errors import UsageError
from lminf_eval.methods.base import window_of
from lminf_eval.methods.registry import make
from tests.test_families import EACH_FAMILY, build
from tests.unchecked import unchecked


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_heads_and_dimensions_are_those_of_the_real_layers(name, randomise):
    model = build(randomise, name)
    if "num_key_value_heads" not in CONFIG_MAPPING[name.split()[0]]().get_text_config().to_dict():
        del model.config.num_key_value_heads  # of the tests' own: this family knows no such number
    patched = unchecked(model, make(n_local=16, n_global=3))
    numbers = iter([number for number, _ in patched.order])
    seen = {}

    def look(attend, module, q, k, v, scale, options):
        window = window_of(patched.layer_rule(module, options).branches)
        seen[next(numbers)] = q.shape[1], k.shape[1], k.shape[3], v.shape[3], None if window == 16 else window
        return attend(module, q, k, v, scale, options)

    with patched.observed(look):
        patched.hidden(torch.randint(3, 97, (1, 20)), patched.new_cache(1, 20))
    patched.restore()
    layers = ModelShape.of(model.config).layers
    found = {i: (one.heads, one.kv_heads, one.key_dim, one.value_dim, one.window) for i, one in enumerate(layers)}
    one_layer = found[0]  # of HRM and DiffLlama, which call more than one attention for a layer, all alike
    assert {i: found.get(i, one_layer) for i in seen} == seen


def test_falcon_7b_has_one_key_value_head():
    shape = ModelShape.of(CONFIG_MAPPING["falcon"](num_attention_heads=71, hidden_size=4544, num_hidden_layers=32))
    assert (shape.heads, shape.kv_heads, shape.head_dim, len(shape.layers)) == (71, 1, 64, 32)


def test_layers_without_keys_have_no_key_value_heads():
    shape = ModelShape.of(CONFIG_MAPPING["lfm2"](layer_types=["conv", "full_attention"], num_hidden_layers=2))
    assert [layer.kv_heads for layer in shape.layers] == [0, 8]


def test_a_config_without_attention_is_refused_in_one_line():
    with pytest.raises(UsageError, match="'mamba': its config names no attention heads"):
        ModelShape.of(CONFIG_MAPPING["mamba"]())
