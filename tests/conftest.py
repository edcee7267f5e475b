"""Fixtures every test may use: a real model, tiny random ones, and a fixed seed."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct in float32, tokenizer included; skips the test where it can't be had."""
    from lminf_eval.errors import UsageError
    from lminf_eval.smollm2 import fetch

    try:
        return fetch()
    except UsageError as error:
        pytest.skip(str(error))


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
