"""Exact lengths: every prefix is one in text and in tokens, whatever the tokenizer does at its end."""

import logging
from pydoc_data.topics import topics

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lminf_eval.errors import UsageError
from lminf_eval.tasks.documents import cut_documents, tail_start

ENGLISH = "\n".join(topics[name] for name in sorted(topics)[:12])
MIXED = "".join(
    f"Zahl {i}:   {i * 7919}\n\n\tприве́т 🙂👩‍👩‍👧 naïve — don't, wouldn't've; 漢字{'=' * (i % 9)}{' ' * (i % 5)}\r\n"
    for i in range(400)
)


def with_bos(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bos = ("<s>", tokenizer.bos_token_id)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def bos_tokenizer(tiny_tokenizer):
    """Puts <s> before every text, as Llama's do."""
    return with_bos(tiny_tokenizer)


@pytest.fixture(scope="module")
def llama2_like():
    """Merges over the whole text, spaces as ▁, one more put before it, bytes for unknown characters, <s> in front."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens])
    backend.train_from_iterator([line for line in ENGLISH.splitlines() if line], trainer)
    return with_bos(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


@pytest.fixture
def log(caplog):
    """The package's log records, also where an earlier test has made lm-eval keep its log to itself."""
    logger = logging.getLogger("lm_eval.lminf_eval.tasks.documents")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield caplog
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)


def cut(texts, tokenizer, **metadata):
    texts = [({"source": f"text {i}"}, text) for i, text in enumerate(texts)]
    return list(cut_documents("corpus", texts, {"tokenizer": tokenizer, **metadata})["test"])


@pytest.mark.parametrize("name", ["tiny_tokenizer", "bos_tokenizer", "llama2_like"])
@pytest.mark.parametrize("text", [ENGLISH, MIXED], ids=["english", "mixed"])
@pytest.mark.parametrize("length", [16, 100, 1024, 3000])
def test_every_prefix_is_one_in_tokens(request, name, text, length):
    tokenizer = request.getfixturevalue(name)
    (doc,) = cut([text], tokenizer, length=length, buckets=min(16, length // 8))
    whole = tokenizer(text)["input_ids"]
    assert text.startswith(doc["text"])
    assert len(doc["text"]) == doc["cuts"][-1]
    assert doc["n_tokens"] == doc["boundaries"][-1]
    assert doc["n_bytes"] == len(doc["text"].encode())
    assert doc["boundaries"] == sorted(set(doc["boundaries"]))
    assert length - 24 <= doc["n_tokens"] <= length
    for boundary, end in zip(doc["boundaries"], doc["cuts"], strict=True):
        assert tokenizer(doc["text"][:end])["input_ids"] == whole[:boundary]


def test_shorter_documents_are_prefixes_of_longer_ones(tiny_tokenizer):
    short, long = (cut([ENGLISH, MIXED], tiny_tokenizer, length=length) for length in (512, 2048))
    assert all(b["text"].startswith(a["text"]) for a, b in zip(short, long, strict=True))


@pytest.mark.parametrize("buckets", [1, 2, 5, 16])
def test_boundaries_are_near_their_marks_and_have_the_last_eighth(tiny_tokenizer, buckets):
    (doc,) = cut([ENGLISH], tiny_tokenizer, length=2048, buckets=buckets)
    marks = {2048 * i // buckets for i in range(1, buckets + 1)}
    if buckets > 1:
        marks.add(tail_start(2048))
    assert tail_start(2048) == 1792
    assert doc["boundaries"] == pytest.approx(sorted(marks), abs=8)
    assert all(boundary <= mark for boundary, mark in zip(doc["boundaries"], sorted(marks), strict=True))


def test_a_short_length_has_fewer_buckets_unless_told_otherwise(tiny_tokenizer):
    (doc,) = cut([ENGLISH], tiny_tokenizer, length=32)
    assert len(doc["boundaries"]) == 5  # quarters and seven eighths


def test_short_documents_are_left_out_and_counted(tiny_tokenizer, log):
    docs = cut(["short", ENGLISH, ENGLISH[:3000], MIXED], tiny_tokenizer, length=2048)
    assert [doc["source"] for doc in docs] == ["text 1", "text 3"]
    assert "2 documents of 2048 tokens; left out 2 shorter ones" in log.text


def test_a_text_of_exactly_the_length_is_taken(tiny_tokenizer):
    text = ENGLISH[:5000]
    n_tokens = len(tiny_tokenizer(text)["input_ids"])
    (doc,) = cut([text], tiny_tokenizer, length=n_tokens)
    assert (doc["text"], doc["n_tokens"]) == (text, n_tokens)


def test_none_long_enough_names_the_longest(tiny_tokenizer):
    reach = len(tiny_tokenizer(ENGLISH[:5000])["input_ids"])
    with pytest.raises(UsageError, match=f"none of 2 documents is that long; the longest has {reach} tokens"):
        cut(["short", ENGLISH[:5000]], tiny_tokenizer, length=reach + 1)


def test_a_text_that_begins_with_the_prefix_token_gets_no_other(bos_tokenizer):
    text = "<s>" + ENGLISH
    (doc,) = cut([text], bos_tokenizer, length=256)
    bare = bos_tokenizer(doc["text"], add_special_tokens=False)["input_ids"]
    assert doc["n_tokens"] == len(bare) == bare.count(0) + 255


def test_add_bos_token_false_counts_none(bos_tokenizer):
    (doc,) = cut([ENGLISH], bos_tokenizer, length=256, add_bos_token=False)
    assert doc["n_tokens"] == len(bos_tokenizer(doc["text"], add_special_tokens=False)["input_ids"]) == 256


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "length=None"),
        ({"length": 15}, "length=15: a whole number of tokens from 16 up"),
        ({"length": "2k"}, "length='2k'"),
        ({"length": 2048, "buckets": 0}, "buckets=0"),
        ({"length": 2048, "buckets": 257}, "from 1 to 256"),
        ({"length": 2048, "buckets": True}, "buckets=True"),
    ],
)
def test_bad_metadata_is_named(tiny_tokenizer, metadata, message):
    with pytest.raises(UsageError, match=message):
        cut([ENGLISH], tiny_tokenizer, **metadata)


def test_bad_metadata_is_told_before_any_text_is_read(tiny_tokenizer):
    def unread():
        raise AssertionError("a text was read")
        yield

    with pytest.raises(UsageError, match="length=3"):
        cut_documents("corpus", unread(), {"tokenizer": tiny_tokenizer, "length": 3})
