"""Memory that does not suffice in the middle of a forward pass: smaller chunks, the same answers to the last bit."""

import logging

import numpy as np
import pytest
import torch

from lminf_eval.errors import UsageError, out_of_memory
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import GenerateRequest, ScoreRequest
from lminf_eval.methods.registry import make
from lminf_eval.models.full_model import FullModel
from lminf_eval.models.patching import PatchedModel

SPECS = {
    "lambda": make(n_local=24, n_global=3),
    "top-k": make(n_local=24, n_global=3, top_k=2, top_k_distance=12),
    "full": make(attention="full"),
}
CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."


def running(model, spec):
    return FullModel(model) if spec.name == "full" else PatchedModel(model, spec)  # without the check at load


def tokens(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, n).astype(np.int32)


def requests() -> list[ScoreRequest]:
    """A document of many windows; two that share 80 tokens and part after them; three short ones that share a batch."""
    common = tokens(80, 1)
    return [
        ScoreRequest(tokens(150, 0), 1, rolling=True),
        *(ScoreRequest(np.append(common, tokens(30 + i, 2 + i)), 70) for i in range(2)),
        *(ScoreRequest(np.append(common, tokens(20 + i, 5 + i)), 85) for i in range(3)),
    ]


class Failing:
    """Fails a layer's attention the first time that it sees `at` tokens or more before it, with `error`."""

    def __init__(self, layer: torch.nn.Module, at: int, error: Exception, times: int = 1):
        self.passed, self.at, self.error, self.left, self.failed = 0, at, error, times, []
        layer.o_proj.register_forward_hook(self)  # after the layer has written its keys and values

    def __call__(self, module, args, output):
        self.passed += output.shape[1]
        if self.passed > self.at and self.left and output.shape[1] > 1:
            self.left -= 1
            self.failed.append(output.shape[1])
            raise self.error


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_failed_chunk_is_computed_again_in_smaller_ones(kind, layer, tiny_model, caplog):
    engine = Engine(running(tiny_model(), SPECS[kind]), 40, 3)
    calm, total = dict(engine.score(requests())), engine.chunks.computed
    for at in (10, 60, 130, 200, 260):
        model = tiny_model()
        engine = Engine(running(model, SPECS[kind]), 40, 3)
        failing = Failing(model.model.layers[layer].self_attn, at, torch.OutOfMemoryError("CUDA out of memory. Tried"))
        caplog.clear()
        found = dict(engine.score(requests()))
        assert len(failing.failed) == 1, at
        assert engine.chunks.chunk_size == failing.failed[0] // 2
        assert (
            f"in a chunk of {failing.failed[0]} tokens; going on with chunk_size={engine.chunks.chunk_size}"
            in caplog.text
        )
        assert engine.chunks.computed == total
        for i, expected in calm.items():
            np.testing.assert_allclose(found[i].log_probs, expected.log_probs, rtol=2e-5, atol=1e-6)
            assert (found[i].greedy == expected.greedy).all()


@pytest.mark.parametrize("kind", SPECS)
def test_the_same_to_the_last_bit_as_a_run_with_those_chunks(kind, tiny_model):
    """The first chunk fails in its last layer, so that all before it have written: as if it had never been."""
    document = [ScoreRequest(tokens(150, 0), 1, rolling=True)]
    model = tiny_model()
    engine = Engine(running(model, SPECS[kind]), 40)
    Failing(model.model.layers[2].self_attn, 0, RuntimeError(CPU))
    ((_, found),) = engine.score(document)
    ((_, expected),) = Engine(running(tiny_model(), SPECS[kind]), 20).score(document)
    assert (found.log_probs == expected.log_probs).all()


@pytest.mark.parametrize("kind", SPECS)
def test_generation_goes_on_in_smaller_chunks(kind, tiny_model):
    prompts = [GenerateRequest(tokens(n, n), 6) for n in (90, 50)]
    expected = dict(Engine(running(tiny_model(), SPECS[kind]), 40, 2).generate(prompts))
    for layer in range(3):
        for at in (30, 70):
            model = tiny_model()
            engine = Engine(running(model, SPECS[kind]), 40, 2)
            failing = Failing(model.model.layers[layer].self_attn, at, RuntimeError(CPU))
            assert dict(engine.generate(prompts)) == expected
            assert failing.failed
            assert engine.chunks.chunk_size == failing.failed[0] // 2


def test_it_gives_up_at_a_small_chunk(tiny_model, caplog):
    model = tiny_model()
    engine = Engine(running(model, SPECS["lambda"]), 100)
    Failing(model.model.layers[1].self_attn, 0, RuntimeError(CPU), times=99)
    with pytest.raises(UsageError, match=r"out of memory for a chunk of 12 tokens \(\[enforce fail"):
        list(engine.score(requests()[:1]))
    assert [record.args for record in caplog.records if record.levelno == logging.WARNING] == [
        (100, 50),
        (50, 25),
        (25, 12),
    ]


def test_ranks_in_step_do_not_change_their_chunks(tiny_model):
    model = tiny_model()
    engine = Engine(running(model, SPECS["lambda"]), 40)
    engine.chunks.lockstep = True
    Failing(model.model.layers[1].self_attn, 0, RuntimeError(CPU))
    with pytest.raises(RuntimeError, match="allocate memory"):
        list(engine.score(requests()))


def test_logits_that_do_not_fit_are_taken_in_smaller_blocks(tiny_model, caplog):
    document = requests()[:1]
    ((_, expected),) = Engine(running(tiny_model(), SPECS["lambda"]), 150).score(document)
    model = tiny_model()
    engine = Engine(running(model, SPECS["lambda"]), 150)
    engine.chunks._logits_at_once = 97 * 64
    most = []

    def fail(module, args, output):
        if output.shape[1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        most.append(output.shape[1])

    model.lm_head.register_forward_hook(fail)
    ((_, found),) = engine.score(document)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-6)
    assert max(most) == 16
    assert "logits of 64 tokens; going on with 32" in caplog.text
    assert engine.chunks.chunk_size == 150


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), True),
        (RuntimeError(CPU), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("out of memory"), False),
    ],
)
def test_which_errors_are_of_memory(error, is_one):
    assert out_of_memory(error) == is_one
