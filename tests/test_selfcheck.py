"""The check at load: what is refused, by which name, and that a refused model is left as it was."""

import json
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.errors import UsageError
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import _ids, _logits_error, patched_model, relative_error
from lminf_eval.models.layer_rotations import Rotation
from lminf_eval.models.rope import Rotary

SPEC = make(n_local=16, n_global=4)
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def build(randomise, kind, **config):
    return randomise(AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config))).eval()


def assert_refused_and_untouched(model, why):
    ids = torch.randint(97, (2, 30))
    with torch.inference_mode():
        before = model(ids, use_cache=False).logits
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    implementation = model.config._attn_implementation
    with pytest.raises(UsageError, match=why) as error:
        patched_model(model, SPEC)
    assert "\n" not in str(error.value)
    assert repr(model.config.model_type) in str(error.value)
    assert model.config._attn_implementation == implementation
    assert not any(hasattr(module, "lminf") for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    with torch.inference_mode():
        after = model(ids, use_cache=False).logits
    assert torch.equal(after, before) or bool(before.isnan().any())


def test_keys_that_change_after_their_rotation(randomise):
    assert_refused_and_untouched(build(randomise, "hunyuan_v1_dense", **SMALL), "depend on absolute positions")


def test_several_tokens_that_end_a_text_are_all_left_out_of_the_check(randomise):
    model = build(randomise, "llama", **SMALL | {"eos_token_id": [2, 7, 9]})
    patched_model(model, SPEC).restore()
    assert not set(_ids(model)[0].tolist()) & {0, 1, 2, 7, 9}


def test_learned_absolute_positions(randomise):
    assert_refused_and_untouched(build(randomise, "gpt2", **GPT2), "can't run the family 'gpt2'")
    assert_refused_and_untouched(build(randomise, "opt", **OPT), "can't run the family 'opt'")


@pytest.mark.parametrize("kind", ["stablelm", "nemotron", "olmo", "gpt_neox", "starcoder2"])
def test_models_with_layer_norm_pass(randomise, kind):
    small = {k: v for k, v in SMALL.items() if kind != "gpt_neox" or k != "num_key_value_heads"}
    model = build(randomise, kind, **small)
    patched = patched_model(model, SPEC)
    assert patched.model is model
    assert set(patched.rotations.by_layer.values()) == {Rotation()}
    patched.restore()


def test_a_layer_without_positions_is_found(randomise):
    patched = patched_model(build(randomise, "smollm3", **SMALL, no_rope_layers=[1, 0]), SPEC)
    assert [*patched.rotations.by_layer.values()] == [Rotation(), None]
    patched.restore()


@pytest.mark.parametrize("where", ["model.layers.0.self_attn.k_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_not_a_number_does_not_pass(tiny_model, where):
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(where).view(-1)[0] = torch.nan
    assert_refused_and_untouched(model, "'llama'")


def test_a_wrong_convention_is_caught(tiny_model, monkeypatch):
    """We rotate by twice the angle that the model does."""
    own = Rotary.angles
    monkeypatch.setattr(Rotary, "angles", lambda self, at, like, kind=None: own(self, 2 * at, like, kind))
    assert_refused_and_untouched(tiny_model(), "after rotating")


def test_wrong_logits_are_caught(tiny_model, monkeypatch):
    """Rotations right, the cache wrong: the last comparison is of whole logits, through cache and decoder."""
    past = LayerCache.past
    with monkeypatch.context() as patch:
        patch.setattr(LayerCache, "past", lambda self, start: (past(self, start)[0], -past(self, start)[1]))
        assert_refused_and_untouched(tiny_model(), "logits differ")
    with monkeypatch.context() as patch:
        patch.setattr(LayerCache, "write", lambda self, k, v, start: None)
        assert_refused_and_untouched(tiny_model(), "logits differ")


@pytest.mark.parametrize("attention", ["rerope", "self_extend", "dca"])
def test_keys_that_are_kept_wrongly_are_caught(tiny_model, monkeypatch, attention):
    own, model = LayerCache.write_older, tiny_model()
    monkeypatch.setattr(LayerCache, "write_older", lambda self, k, v, starts: own(self, k.flip(2), v, starts))
    with pytest.raises(UsageError, match="logits"):
        patched_model(model, make(attention, n_local=16))


@pytest.mark.parametrize("attention", ["lambda", "rerope", "self_extend", "dca"])
@pytest.mark.parametrize("n_local", [1, 2, 3, 5, 20, 21, 100])
def test_any_window_can_be_checked(tiny_model, attention, n_local):
    patched_model(tiny_model(), make(attention, n_local=n_local, n_global=0)).restore()


def test_a_window_of_one_token_does_not_blind_the_check(randomise):
    """Beyond that window the starting tokens are seen at distance 1, so rotations matter."""
    model = build(randomise, "hunyuan_v1_dense", **SMALL)
    with pytest.raises(UsageError, match="depend on absolute positions"):
        patched_model(model, make(n_local=1, n_global=0)).restore()


def test_half_precision_models_pass(tiny_model):
    patched_model(tiny_model().bfloat16(), SPEC).restore()
    patched_model(tiny_model().double(), SPEC).restore()


def test_the_error_is_relative_and_keeps_nan():
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a * 1.1, a) == pytest.approx(0.1)
    assert relative_error(a, a) == 0
    assert relative_error(torch.tensor([3.0, torch.nan]), a) != relative_error(torch.tensor([3.0, torch.nan]), a)


def test_a_model_is_patched_once(tiny_model):
    patched = patched_model(tiny_model(), SPEC)
    with pytest.raises(UsageError, match="the model is patched already"):
        patched_model(patched.model, SPEC)
    patched_model(patched.restore(), SPEC).restore()


@pytest.mark.parametrize(
    ("kind", "dtype", "forgiven"),
    [
        ("mixtral", torch.bfloat16, True),
        ("qwen3_moe", torch.float16, True),
        ("mixtral", torch.float32, False),
        ("llama", torch.bfloat16, False),
    ],
)
def test_another_expert_for_a_token_or_two_is_forgiven_in_half_precision(kind, dtype, forgiven):
    model = SimpleNamespace(config=CONFIG_MAPPING[kind](), dtype=dtype)
    expected = torch.randn(16, 97, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = expected.clone()
    found[[5, 15]] = -expected[[5, 15]]
    error = _logits_error(found, expected, model)
    assert error == 0 if forgiven else error == pytest.approx(0.7, abs=0.1)
    found[:8] = -expected[:8]
    assert _logits_error(found, expected, model) > 1
    found[3, 0] = torch.nan
    assert not _logits_error(found, expected, model) < 100


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.mark.parametrize("attention", ["lambda", "full"])
def test_custom_code_that_passes_the_check_runs(attention, tiny_llama):
    """A user who trusts a model's own code gets the check at load as the judge, as for any family."""
    folder = tiny_llama(max_position_embeddings=512)
    expected = lminf(folder, attention)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_mine.py").write_text(CUSTOM)
    assert lminf(folder, attention, trust_remote_code=True) == pytest.approx(expected, rel=1e-5)


def lminf(folder, attention, **options):
    request = Instance("loglikelihood", {}, ("The grass is green. " * 4, " The sky"), 0)
    lm = LMInfinite(str(folder), device="cpu", dtype="float32", attention=attention, **options)
    return lm.loglikelihood([request])[0][0]
