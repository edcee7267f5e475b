"""Texts encoded piece by piece give the tokens of the whole, in a fraction of the memory, each piece once."""

import random
from pydoc_data.topics import topics

import numpy as np
import pytest

from lminf_eval.tasks import chunked_tokenization
from lminf_eval.tasks.chunked_tokenization import Pieces, encode

PLAIN = "\n".join(topics[name] for name in sorted(topics))[:60_000]
TEXTS = {
    "prose": PLAIN,
    "no spaces": PLAIN.replace(" ", "").replace("\n", ""),
    "several bytes a character": "".join(random.Random(0).choices("añ日本語é🙂 ё\n", k=20_000)),
    "spaces alone": " " * 20_000,
    "one word": "na" * 10_000,
    "few words": "The grass is green. " * 1_000,
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(chunked_tokenization, "PIECE", 4096)


@pytest.fixture(scope="module")
def unigram():
    """A SentencePiece-like tokenizer: a space put before, spaces as ▁, no split into words, the likeliest pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(PLAIN.split(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("name", ["tiny_tokenizer", "unigram"])
def test_tokens_and_places_are_those_of_the_whole(request, name, text):
    tokenizer = request.getfixturevalue(name)
    ids, spans = Pieces(tokenizer).encode(text)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ids.tolist() == whole["input_ids"]
    assert spans.tolist() == [list(span) for span in whole["offset_mapping"]]


def test_every_length_about_the_borders_of_pieces(tiny_tokenizer):
    one = Pieces(tiny_tokenizer)
    for length in [*range(8190, 8196), *range(10_236, 10_244), *range(12_286, 12_291)]:
        assert one.encode(PLAIN[:length])[0].tolist() == tiny_tokenizer(PLAIN[:length])["input_ids"]


def count_characters(tokenizer, monkeypatch):
    seen = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **kw: seen.append(len(text)) or call(self, text, **kw)
    )
    return seen


def test_nested_prefixes_take_little_more_than_the_longest(tiny_tokenizer, monkeypatch):
    seen = count_characters(tiny_tokenizer, monkeypatch)
    one = Pieces(tiny_tokenizer)
    for i in range(1, 17):
        one.encode(PLAIN[: len(PLAIN) * i // 16])
    assert max(seen) < 2.1 * chunked_tokenization.PIECE
    assert sum(seen) < 3.5 * len(PLAIN)  # and 8.5 times, each from the beginning


def test_pieces_are_forgotten_in_time(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(chunked_tokenization, "_REMEMBERED", 3)
    one = Pieces(tiny_tokenizer)
    for text in (PLAIN, PLAIN[::-1], PLAIN):
        assert one.encode(text)[0].tolist() == tiny_tokenizer(text)["input_ids"]
        assert len(one._remembered) == 3


def test_where_neighbours_do_not_agree_the_text_is_encoded_whole(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(chunked_tokenization, "_joint", lambda *_: None)
    seen = count_characters(tiny_tokenizer, monkeypatch)
    ids, _ = Pieces(tiny_tokenizer).encode(PLAIN)
    assert seen[-1] == len(PLAIN)
    assert ids.tolist() == tiny_tokenizer(PLAIN)["input_ids"]


def test_special_tokens_go_around_the_whole(tiny_tokenizer):
    def around(text):
        return [0, *tiny_tokenizer(text)["input_ids"], 1, 1]

    assert encode(tiny_tokenizer, PLAIN, around).tolist() == around(PLAIN)


def test_what_changes_the_texts_own_tokens_gets_the_whole_text(tiny_tokenizer):
    def last(text):
        return tiny_tokenizer(text)["input_ids"][-100:]

    assert encode(tiny_tokenizer, PLAIN, last).tolist() == last(PLAIN)
    assert encode(tiny_tokenizer, PLAIN, last).dtype == np.int32
