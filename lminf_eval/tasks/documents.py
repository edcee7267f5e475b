"""Documents of an exact number of tokens, and the places inside them where a perplexity task asks for a prefix.

lm-eval hands models text, not tokens. So a text is cut only where the tokens of the cut text are the first tokens of
the whole text: then every prefix is a true prefix in tokens too, and what is counted is what is scored.
"""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import Dataset

from lminf_eval.errors import UsageError
from lminf_eval.tasks.chunked_tokenization import Tokens
from lminf_eval.tasks.tokenizer import TaskTokenizer, load_tokenizer

logger = logging.getLogger(f"lm_eval.{__name__}")  # under lm-eval's own, which shows it

# What is to be recorded of a document's origin, and its text.
Text = tuple[dict[str, Any], str]

TAIL = (7, 8)  # `nll_tail` is over the tokens beyond this fraction of the length

_SHORTEST = 16  # tokens; below that a length has no eighth worth the name
_CONTEXT = 64  # tokens re-encoded to see whether a cut changes those before it
_COMPARED = 32  # of these, the last ones, which the arbitrary start of the context does not reach
_SAMPLE = 2**14  # characters that tell how many a token has
_SEARCHED = 256  # cuts tried, each a token shorter, before a document is given up


def tail_start(length: int) -> int:
    """Return the token of a document of `length` at which its last eighth begins."""
    return length * TAIL[0] // TAIL[1]


def read_length(corpus: str, metadata: dict[str, Any]) -> int:
    """Return the `length` of a corpus's documents, in tokens.

    Raises:
        UsageError: if it is no whole number, or too small.
    """
    length = metadata.get("length")
    if type(length) is not int or length < _SHORTEST:
        raise UsageError(f"{corpus} length={length!r}: a whole number of tokens from {_SHORTEST} up is needed")
    return length


def cut_documents(corpus: str, texts: Iterable[Text], metadata: dict[str, Any]) -> dict[str, Dataset]:
    """Cut the documents of a perplexity task: the first `length` tokens of every text that has as many.

    Metadata: `length` in tokens; `buckets` (16, fewer below 128 tokens), how many prefixes of growing length are
    scored, 1 for the whole document alone; and the model arguments that name the tokenizer.

    A document has `text`; `length`, the target, and `n_tokens`, the number of tokens scored: at most a few below the
    length, special tokens included where the tokenizer adds them, since `hf` scores these too; `n_bytes`, its size in
    UTF-8; `boundaries`, the tokens scored in each prefix, and `cuts`, where it ends, in characters; `source`. The last
    prefix is the text.

    Raises:
        UsageError: a value is out of range, or no text reaches the length.
    """
    length = read_length(corpus, metadata)
    buckets = metadata.get("buckets", min(16, length // 8))
    if type(buckets) is not int or not 1 <= buckets <= length // 8:
        raise UsageError(f"{corpus} buckets={buckets!r}: a whole number from 1 to {length // 8} (length / 8) is needed")
    marks = {length * i // buckets for i in range(1, buckets)}
    if buckets > 1:
        marks.add(tail_start(length))
    return {"test": Dataset.from_list(cut_texts(corpus, texts, metadata, length, marks))}


def cut_texts(
    corpus: str, texts: Iterable[Text], metadata: dict[str, Any], length: int, marks: set[int]
) -> list[dict[str, Any]]:
    """Return the first `length` tokens of every text that has as many, and prefixes that end near `marks`.

    Fields are those of `cut_documents`.

    Raises:
        UsageError: no text reaches the length.
    """
    tokenizer = load_tokenizer(**metadata)

    docs: list[dict[str, Any]] = []
    total = uncut = 0
    longest = ""
    for origin, text in texts:
        total += 1
        longest = max(longest, text, key=len)
        if (
            len(text.encode()) + 2 < length
        ):  # no token is less than a byte, but for a start token and a space put before
            continue
        ids, offsets = _first_tokens(tokenizer, text, length)
        if len(ids) + tokenizer.n_special(text) < length:
            continue
        if fields := _cut(tokenizer, text, ids, offsets, length, marks):
            docs.append({**fields, **origin})
        else:
            uncut += 1
    if uncut:
        logger.warning("%s: left out %d documents without a place to cut near token %d", corpus, uncut, length)
    if not docs:
        reach = len(tokenizer.encode(longest)) if longest else 0
        raise UsageError(
            f"{corpus} length={length}: none of {total} documents is that long; the longest has {reach} tokens"
        )
    logger.info(
        "%s: %d documents of %d tokens; left out %d shorter ones", corpus, len(docs), length, total - uncut - len(docs)
    )
    return docs


def _first_tokens(tokenizer: TaskTokenizer, text: str, count: int) -> Tokens:
    """Return tokens of the text's beginning: all of it, or well over `count` tokens."""
    sample = text[:_SAMPLE]
    characters = int(1.1 * count * len(sample) / max(1, len(tokenizer.encode_bare(sample)))) + 1000
    while True:
        ids, offsets = tokenizer.offsets(text[:characters])
        if characters >= len(text) or len(ids) >= count + _CONTEXT:
            return ids, offsets
        characters *= 2


def _cut(
    tokenizer: TaskTokenizer, text: str, ids: np.ndarray, offsets: np.ndarray, length: int, marks: set[int]
) -> dict[str, Any] | None:
    special = tokenizer.n_special(text)
    end = _stable_cut(tokenizer, text, ids, offsets, length - special)
    while end and not np.array_equal(tokenizer.encode_bare(text[: offsets[end - 1, 1]]), ids[:end]):
        end = _stable_cut(tokenizer, text, ids, offsets, end - 1)
    if not end:
        return None
    prefixes = {_stable_cut(tokenizer, text, ids, offsets, mark - special) for mark in marks}
    counts = sorted({count for count in prefixes if 0 < count < end} | {end})
    cuts = [int(offsets[count - 1, 1]) for count in counts]
    return {
        "text": text[: cuts[-1]],
        "length": length,
        "n_tokens": end + special,
        "n_bytes": len(text[: cuts[-1]].encode()),
        "boundaries": [count + special for count in counts],
        "cuts": cuts,
    }


def _stable_cut(tokenizer: TaskTokenizer, text: str, ids: np.ndarray, offsets: np.ndarray, count: int) -> int:
    """Return the most tokens, at most `count`, after which a cut does not change the tokens before it; 0 for none.

    A cut is judged by the tokens right before it, the only ones that it can change in byte-pair encodings.
    """
    for kept in range(count, max(0, count - _SEARCHED), -1):
        end = offsets[kept - 1, 1]
        if kept < len(ids) and offsets[kept, 0] < end:  # inside a character whose bytes are several tokens
            continue
        first = max(0, kept - _CONTEXT)
        compared = kept if first == 0 else _COMPARED
        again = tokenizer.encode_bare(text[offsets[first, 0] if first else 0 : end])
        if np.array_equal(again[-compared:], ids[kept - compared : kept]) and (first or len(again) == kept):
            return kept
    return 0
