"""Pairs of texts become tokens as in lm-eval's hf, for any text; a continuation is scored on tokens of its own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from lminf_eval.errors import UsageError
from lminf_eval.harness.lm import LMInfinite
from tests.test_adapter import pairs

TEXTS = st.text(st.sampled_from("ab wi.,\n\té漢😀\u0301<>/s0"), max_size=12) | st.text(max_size=6)
PIECES = st.one_of(TEXTS, st.sampled_from(["", " ", "  ", "</s>", "<s>", "<s>a", "a</s>", "ing", "=", " ="]))


@pytest.fixture(scope="module")
def models(tiny_llama):
    folder = str(tiny_llama(max_position_embeddings=512))
    return LMInfinite(folder, device="cpu", dtype="float32"), HFLM(folder, device="cpu", dtype="float32")


@settings(max_examples=300)
@given(context=PIECES.filter(bool), continuation=PIECES)
def test_pairs_are_split_as_hf_splits_them_unless_nothing_is_left(models, context, continuation):
    ours, theirs = models
    expected = theirs._encode_pair(context, continuation)
    try:
        found = ours._encode_pair(context, continuation)
    except UsageError:
        assert not theirs.tok_encode(continuation, add_special_tokens=False)
        return
    if expected[1] or not continuation:
        assert found == expected
    else:
        assert found == (ours.tok_encode(context), ours.tok_encode(continuation, add_special_tokens=False))


@settings(max_examples=150)
@given(context=PIECES, continuation=PIECES)
def test_any_pair_is_answered_or_refused_in_one_line(models, context, continuation):
    ours, theirs = models
    try:
        ((log_prob, _),) = ours.loglikelihood(pairs((context, continuation)), disable_tqdm=True)
    except UsageError:
        assert not continuation or not theirs.tok_encode(continuation, add_special_tokens=False)
        return
    scored = context[len(context.rstrip()) :] + continuation  # as hf has it, spaces go with what follows them
    alone = not context and continuation == theirs.tokenizer.bos_token  # the token before it, and nothing after
    assert (log_prob == 0) == (not scored or alone)


@settings(max_examples=200)
@given(text=st.text(max_size=30) | st.text(st.characters(categories=("Cs", "L", "Z")), max_size=8))
def test_texts_with_lone_surrogates_too_become_tokens_as_in_hf_or_are_an_error_in_both(models, text):
    def tokens(model):
        try:
            return model.tok_encode(text)
        except (TypeError, UnicodeEncodeError, ValueError) as error:
            return type(error)

    ours, theirs = models
    assert tokens(ours) == tokens(theirs)


@pytest.mark.parametrize(("context", "continuation"), [("They saw him walk", "ing"), ("x =", "=")])
def test_a_continuation_that_merges_into_its_context_is_scored(context, continuation, smollm2):
    """hf counts the merged token to the context, and asserts; (0.0, True) would win any multiple choice."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert len(tokenizer.encode(context + continuation)) == len(tokenizer.encode(context))
    lm = LMInfinite(str(smollm2), device="cpu", dtype="float32")
    ((log_prob, greedy),) = lm.loglikelihood(pairs((context, continuation)))
    assert log_prob < -0.1
    assert not greedy


def test_nothing_after_nothing_is_refused_in_one_line(models):
    with pytest.raises(UsageError, match="neither a context nor a continuation"):
        models[0].loglikelihood(pairs(("", "")))


def test_a_tokenizer_with_more_tokens_than_the_model_is_named(tiny_llama, tiny_tokenizer):
    lm = LMInfinite(str(tiny_llama(vocab_size=300)), device="cpu")
    lm.loglikelihood(pairs(("a", "b")))
    token = tiny_tokenizer.decode([400])
    with pytest.raises(UsageError, match="its token 400 is beyond the model's vocabulary of 300"):
        lm.loglikelihood(pairs(("a", token)))
