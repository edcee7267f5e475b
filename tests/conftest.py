"""Fixtures every test may use: a real model, tiny random ones, and a fixed seed."""

import os
import shutil
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import settings

settings.register_profile("lminf", deadline=None, derandomize=True, database=None)
settings.load_profile("lminf")


def pytest_configure(config):
    """Every process started from here on, of pytest-xdist or of a test, begins with tests/startup/sitecustomize.py."""
    if "LMINF_TESTS_PARSED" in os.environ:
        return
    folder = tempfile.mkdtemp()
    config.add_cleanup(lambda: shutil.rmtree(folder))
    os.environ["LMINF_TESTS_PARSED"] = os.path.join(folder, "tasks.pickle")
    paths = [str(Path(__file__).parent / "startup"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _without_torchao():
    """The processes that tests start have no torchao, as most users'; tests in this process have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMINF_TESTS_WITHOUT", "torchao")
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _real_model(name: str) -> Path:
    from lminf_eval.demo.models import MODELS, fetch
    from lminf_eval.errors import UsageError

    try:
        return fetch(MODELS[name])
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in float32; skip the test if it cannot be fetched."""
    return _real_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Return the folder of Gemma 3 270M (base) in float32; skip the test if it cannot be fetched."""
    return _real_model("gemma3-270m")


def _randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise)
    return model


@pytest.fixture(scope="session")
def randomise():
    """`randomise(model)` draws every parameter at random, in place: norm weights of exactly one hide mistakes."""
    return _randomise


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE of 512 entries, trained on the text every CPython carries; encodes any string losslessly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((topics[name] for name in sorted(topics)[:20]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tiny_tokenizer):
    """`tiny_llama(**config)` -> directory of a random two-layer Llama with its tokenizer (float32, about 0.6 MB).

    Grouped-query attention (4 heads, 2 key-value heads, head_dim 16) and 64 trained positions, unless `config` (keyword
    arguments of `LlamaConfig`) says otherwise.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**config) -> Path:
        defaults = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
        }
        folder = tmp_path_factory.mktemp("tiny-llama")
        _randomise(LlamaForCausalLM(LlamaConfig(**defaults | config))).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model():
    """`tiny_model(**config)`: a random three-layer Llama of 97 tokens in memory, with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**config) -> torch.nn.Module:
        defaults = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        return _randomise(LlamaForCausalLM(LlamaConfig(**defaults | config))).eval()

    return make


@pytest.fixture(scope="session")
def reference_logits():
    """`reference_logits(model, method, ids [B, S], answers_from)` -> logits [B, S, V] of the model by the definition.

    Every layer's attention is `attention/reference.py` over the whole sequence at once, at absolute positions; with
    tokens that see more from the position `answers_from` on.
    """
    from lminf_eval.attention.reference import reference_attention
    from lminf_eval.methods.base import WindowedMethod
    from lminf_eval.methods.registry import make
    from lminf_eval.models.forward_context import ForwardContext
    from tests.unchecked import unchecked

    def logits(
        model: torch.nn.Module, method: WindowedMethod, ids: torch.Tensor, answers_from: int | None = None
    ) -> torch.Tensor:
        patched = unchecked(model, method)

        def attend(_, module, q, k, v, scale, options):
            def rotate(x, positions):
                return patched.rotate(module, ForwardContext(None), x, positions[None], "reference")

            own = options.get("sliding_window")
            layer = make("window", n_local=own) if own else method
            extra = {"softcap": options.get("softcap"), "sink_logits_H": options.get("s_aux")}
            extra |= {"slopes_H": patched.slopes, "answers_from": answers_from, "layer": module.layer_idx}
            return reference_attention(q, k, v, rotate, layer, scale, **extra)

        try:
            with patched.observed(attend), torch.inference_mode():
                output = patched.decoder(input_ids=ids, use_cache=False)
                return torch.stack([patched.logits(output, hidden) for hidden in output.last_hidden_state])
        finally:
            patched.restore()

    return logits
