"""What stays in memory while prompts are read and continued: little more than the longest sequence needs."""

import gc

import pytest
import torch

from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import GenerateRequest
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import full_model, patched_model

METHODS = {
    "full": {},
    "retrieval": {"n_local": 16, "n_global": 3, "top_k": 4, "top_k_from_layer": 0, "top_k_distance": 16},
    "rerope": {"attention": "rerope", "n_local": 16},
    "answers": {"n_local": 16, "n_global": 3, "full_decode": True},
}
TOKENS = 4000
ONE = 3 * 2 * 2 * 8 * 4 * TOKENS  # bytes: layers, keys and values, heads, dimension, float32


class Watch:
    """Takes the place of a progress bar; notes the most bytes that tensors of over 1,000 numbers take."""

    most = 0

    def reset(self, total):
        pass

    def update(self, n):
        held = {}
        for x in gc.get_objects():
            if type(x) is torch.Tensor and x.numel() > 1000:
                held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        self.most = max(self.most, sum(held.values()))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("apart", [0, 3000], ids=["unrelated prompts", "shared beginnings"])
def test_one_prompts_keys_are_held_at_a_time(name, apart, tiny_model):
    model = tiny_model()
    runner = full_model(model) if name == "full" else patched_model(model, make(**METHODS[name]))
    common = torch.randint(97, (apart,)).tolist()
    prompts = [common + torch.randint(97, (TOKENS - apart - 2,)).tolist() for _ in range(2)]
    gc.collect()
    before = Watch()
    before.update(0)
    watch = Watch()
    list(Engine(runner, 1000, 1, progress=watch).generate([GenerateRequest(prompt, 2) for prompt in prompts]))
    assert 0.9 * ONE < watch.most - before.most < (1.4 + apart / TOKENS) * ONE
