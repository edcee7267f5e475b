"""`--model_args` as people write them: meant values are taken, anything else is refused in one line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.utils import simple_parse_args_string

from lminf_eval.errors import UsageError
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.harness.model_args import as_given, own_args
from lminf_eval.tasks.tokenizer import load_tokenizer

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.sampled_from(["true", "False", "2048", "16k", "0", "-1", "1e3", "lambda", "full", "none", "auto", "nan"]),
)
NAMES = st.sampled_from(
    [
        *(name for name in own_args() if name != "journal"),
        "max_length",
        "batch_size",
        "dtype",
        "revision",
        "device",
        "think_end_token",
    ]
)


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return str(tiny_llama(max_position_embeddings=512))


@settings(max_examples=150)
@given(args=st.dictionaries(NAMES, VALUES, max_size=3))
def test_any_value_is_taken_or_refused_in_one_line(folder, args):
    refusal = ""
    try:
        LMInfinite(folder, **{"device": "cpu", **args})
    except UsageError as error:
        refusal = str(error)
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("given_as", "meant"),
    [
        ({"top_k": None, "n_local": None, "n_global": None}, {}),
        ({"prefix_sharing": "false", "n_local": "48"}, {"prefix_sharing": False, "n_local": 48}),
        ({"prefix_states": "2", "max_length": "64"}, {"prefix_states": 2, "max_length": 64}),
        ({"rope": None, "journal": None, "parallel": None}, {}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
)
def test_yaml_means_what_its_writer_means(given_as, meant, folder):
    found, expected = (LMInfinite(folder, device="cpu", **how) for how in (given_as, meant))
    assert (found.method, found.args.execution) == (expected.method, expected.args.execution)
    assert (found.max_length, found._unread["dtype"]) == (expected.max_length, expected._unread["dtype"])


@pytest.mark.parametrize("revision", ["20240101", "1.0"])
def test_a_revision_that_looks_like_a_number_is_text(revision, folder):
    args = simple_parse_args_string(f"revision={revision}")
    assert not isinstance(args["revision"], str)
    assert as_given(args) == {"revision": revision}
    LMInfinite(folder, device="cpu", **args)
    assert load_tokenizer(pretrained=folder, **args).encode("a").tolist()


@pytest.mark.parametrize(
    "args", [{"offload_buffers": True}, {"key_mapping": {}}, {"force_download": False}, {"torch_dtype": "float32"}]
)
def test_arguments_that_hf_hands_on_to_transformers_work(args, folder):
    lm = LMInfinite(folder, device="cpu", **args)
    assert lm.load().dtype.is_floating_point


def test_a_misspelling_is_named_with_what_is_nearest(folder):
    with pytest.raises(UsageError, match=r"unknown argument ofload_buffers=True \(did you mean offload_buffers\?\)"):
        LMInfinite(folder, device="cpu", ofload_buffers=True)
