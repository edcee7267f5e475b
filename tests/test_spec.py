"""What the method is asked to do: parsing, its one-line refusals, and where the default window comes from."""

import pytest
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MptConfig,
    Phi3Config,
    T5Config,
)

from lminf_eval.config.trained_length import trained_length
from lminf_eval.errors import UsageError
from lminf_eval.harness.model_args import own_args
from lminf_eval.methods.registry import MethodArgs
from lminf_eval.utils.names import closest


def test_defaults_are_the_papers():
    method = MethodArgs.parse({}).at(4096)
    assert (method.name, method.n_local, method.n_global, method.top_k) == ("lambda", 4096, 10, 0)


def test_values_may_come_as_strings():
    args = MethodArgs.parse({"n_local": "2048", "n_global": "0", "attention": "streaming"})
    assert args.given == {"n_local": 2048, "n_global": 0}
    assert (args.at(0).n_local, args.at(0).n_global, args.at(0).name) == (2048, 0, "streaming")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"n_local": 0}, ["n_local=0", "greater than or equal to 1"]),
        ({"n_local": -5}, ["n_local=-5", "greater than or equal to 1"]),
        ({"n_local": "many"}, ["n_local=many", "integer"]),
        ({"n_local": 20.5}, ["n_local=20.5", "integer"]),
        ({"n_global": -1}, ["n_global=-1", "greater than or equal to 0"]),
        ({"n_local": 8, "n_global": 8}, ["n_global=8", "smaller than n_local=8"]),
        ({"n_local": 8, "n_global": 9}, ["n_global=9", "smaller than n_local=8"]),
        ({"n_local": 8}, ["n_global=10", "smaller than n_local=8"]),
        ({"n_local": 8, "n_global": 9, "attention": "streaming"}, ["n_global=9", "smaller than n_local=8"]),
        ({"attention": "sparse"}, ["attention=sparse", "lambda", "full", "streaming", "window", "rerope"]),
        ({"attention": "streamin"}, ["attention=streamin", "did you mean streaming?"]),
        ({"attention": "full", "n_local": 0}, ["n_local=0", "greater than or equal to 1"]),
        ({"rope": "yarn", "rope_factor": 4}, ["goes with attention=full, not with attention=lambda"]),
        ({"rerope_step": 4}, ["rerope_step=4.0 goes with attention=rerope, not with attention=lambda"]),
        ({"self_extend_group": 4}, ["self_extend_group=4 goes with attention=self_extend, not with attention=lambda"]),
        ({"attention": "self_extend", "self_extend_group": 0}, ["self_extend_group=0", "greater than or equal to 1"]),
        ({"attention": "self_extend", "self_extend_group": 2.5}, ["self_extend_group=2.5", "integer"]),
        ({"n_locl": 8}, ["n_locl=8"]),
        ({"n_local": True}, ["n_local=True", "must be a number"]),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(args, named):
    with pytest.raises(UsageError) as error:
        MethodArgs.parse(args)
    message = str(error.value)
    assert "\n" not in message
    for part in named:
        assert part in message


def test_several_bad_values_are_all_named_in_one_line():
    with pytest.raises(UsageError) as error:
        MethodArgs.parse({"n_local": 0, "n_global": -1, "top_k": -2})
    assert "\n" not in str(error.value)
    for part in ("n_local=0", "n_global=-1", "top_k=-2"):
        assert part in str(error.value)


def test_methods_without_starting_tokens_take_any_window():
    """The default n_global is 10; a window of 5 is fine where no starting tokens are kept."""
    assert MethodArgs.parse({"attention": "window", "n_local": 5}).at(0).kept(100) == 5
    assert MethodArgs.parse({"attention": "full", "n_local": 5}).record()["n_local"] == 5
    assert MethodArgs.parse({"n_local": 11}).at(0).kept(100) == 21


PHI3_FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize(
    ("config", "length", "key"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096, "max_position_embeddings"),
        (
            LlamaConfig(
                max_position_embeddings=131072,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            ),
            8192,
            "original_max_position_embeddings",
        ),
        (
            LlamaConfig(
                max_position_embeddings=65536,
                rope_parameters={
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 16.0,
                    "original_max_position_embeddings": 4096,
                },
            ),
            4096,
            "original_max_position_embeddings",
        ),
        (
            LlamaConfig(
                max_position_embeddings=2048,
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            ),
            2048,
            "max_position_embeddings",
        ),
        (
            Phi3Config(
                hidden_size=64,
                num_attention_heads=4,
                pad_token_id=0,
                max_position_embeddings=131072,
                original_max_position_embeddings=4096,
                rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **PHI3_FACTORS},
            ),
            4096,
            "original_max_position_embeddings",
        ),
        (Gemma3TextConfig(max_position_embeddings=32768), 32768, "max_position_embeddings"),
        (
            Gemma3TextConfig(
                max_position_embeddings=131072,
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {
                        "rope_type": "yarn",
                        "rope_theta": 1e6,
                        "factor": 8.0,
                        "original_max_position_embeddings": 16384,
                    },
                },
            ),
            16384,
            "original_max_position_embeddings",
        ),
        (GPT2Config(n_positions=1024), 1024, "max_position_embeddings"),
        (MptConfig(max_seq_len=3000), 3000, "max_seq_len"),
        (FalconConfig(max_position_embeddings=2048, alibi=True), 2048, "max_position_embeddings"),
        (LlavaConfig(text_config=LlamaConfig(max_position_embeddings=1234)), 1234, "max_position_embeddings"),
        (BloomConfig(seq_length=2048), 2048, "seq_length"),
        (T5Config(), None, "none"),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else None,
)
def test_the_length_a_model_was_trained_at(config, length, key):
    assert trained_length(config) == (length, key)


def test_the_window_is_the_trained_length_unless_set():
    config = LlamaConfig(max_position_embeddings=4096)
    spec, why = MethodArgs.parse({"n_global": 4}).resolve(config)
    assert (spec.n_local, spec.n_global, why) == (4096, 4, "max_position_embeddings")
    spec, why = MethodArgs.parse({"n_local": 77}).resolve(config)
    assert (spec.n_local, why) == (77, "set by n_local")


def test_no_length_to_be_had_asks_for_one():
    with pytest.raises(UsageError, match="'t5' tells no pre-training length; pass n_local=<tokens>"):
        MethodArgs.parse({}).resolve(T5Config())


def test_starting_tokens_must_fit_in_the_trained_length_too():
    with pytest.raises(UsageError, match="n_global=64 must be smaller than n_local=64"):
        MethodArgs.parse({"n_global": 64}).resolve(LlamaConfig(max_position_embeddings=64))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("n_locl", " (did you mean n_local?)"), ("chunksize", " (did you mean chunk_size?)"), ("xyz", "")],
)
def test_a_hint_at_the_nearest_name(name, hint):
    assert closest(name, own_args()) == hint
