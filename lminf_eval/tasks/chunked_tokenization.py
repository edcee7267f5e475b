"""Megabytes of text into tokens, in bounded memory and time: piece by piece, each piece once.

A tokenizer takes some 400 bytes a token while it works, and would take each of a document's nested prefixes from the
beginning. Here a text is encoded in pieces that overlap, and a piece is remembered.

Neighbouring pieces see a little of each other. They are joined in the middle of the longest run of tokens on which they
agree: what becomes of a stretch of text depends on what is near it only. Where they agree nowhere, as may happen inside
a long run of one character, the text is encoded as a whole.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from weakref import WeakValueDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase

PIECE = 2**16  # characters; a text of twice as many is encoded in pieces
_OVERLAP = 2**10  # characters that a piece sees of its neighbour on either side
_AGREED = 32  # tokens in a row
_REMEMBERED = 128  # pieces: some 40 MB

# Token ids [n] and the characters [n, 2] that each token covers, from and to.
Tokens = tuple[np.ndarray, np.ndarray]


class Pieces:
    """A fast tokenizer that works piece by piece. It adds no special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._remembered: OrderedDict[str, Tokens] = OrderedDict()

    def encode(self, text: str) -> Tokens:
        """Return token ids [n], and the characters [n, 2] that each token covers."""
        if len(text) < 2 * PIECE:
            return self._encoded(text)
        starts = range(0, len(text) - PIECE // 2, PIECE)  # the last piece is up to a half longer
        ids, spans = [], []
        before, first = self._piece(text, 0, PIECE), 0
        for start in starts[1:]:
            after = self._piece(text, start, len(text) if start == starts[-1] else start + PIECE)
            joint = _joint(before, after, start)
            if joint is None:
                return self._encoded(text)
            ids.append(before[0][first : joint[0]])
            spans.append(before[1][first : joint[0]])
            before, first = after, joint[1]
        return np.concatenate([*ids, before[0][first:]]), np.concatenate([*spans, before[1][first:]])

    def _piece(self, text: str, start: int, stop: int) -> Tokens:
        low = max(0, start - _OVERLAP)
        part = text[low : stop + _OVERLAP]
        if part not in self._remembered:
            self._remembered[part] = self._encoded(part)
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(part)
        ids, spans = self._remembered[part]
        return ids, spans + np.int32(low)

    def _encoded(self, text: str) -> Tokens:
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        ids, spans = encoding["input_ids"], encoding["offset_mapping"]
        return np.array(ids, dtype=np.int32), np.array(spans, dtype=np.int32).reshape(-1, 2)


@lru_cache(maxsize=4)
def pieces(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """Return the `Pieces` of a tokenizer, shared by all tokenizers equal to it: task and model each load their own."""
    return _by_text.setdefault(fingerprint_tokenizer(tokenizer), Pieces(tokenizer))


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return hexadecimal digits that tell a tokenizer from others: by all of a fast one, by a slow one's vocabulary."""
    text = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    return hashlib.sha256(text.encode()).hexdigest()


_by_text: WeakValueDictionary[str, Pieces] = WeakValueDictionary()


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, with_specials: Callable[[str], Sequence[int] | np.ndarray]
) -> np.ndarray:
    """Return token ids [n] as `with_specials` gives them; it may add special tokens before and after a text."""
    if len(text) >= 2 * PIECE and tokenizer.is_fast:
        head = text[:PIECE]
        whole, bare = list(with_specials(head)), pieces(tokenizer).encode(head)[0].tolist()
        for n in range(len(whole) - len(bare) + 1):
            if whole[n : n + len(bare)] == bare:
                parts = whole[:n], pieces(tokenizer).encode(text)[0], whole[n + len(bare) :]
                return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
    return np.asarray(with_specials(text), dtype=np.int32)


def _joint(before: Tokens, after: Tokens, border: int) -> tuple[int, int] | None:
    """Return the index into each piece's tokens at which they are joined; None if too few tokens agree."""
    begins, rows = [], []
    for ids, spans in (before, after):
        low = int(np.searchsorted(spans[:, 0], border - _OVERLAP))
        high = int(np.searchsorted(spans[:, 0], border + _OVERLAP))
        begins.append(low)
        rows.append(
            [(token, *span) for token, span in zip(ids[low:high].tolist(), spans[low:high].tolist(), strict=True)]
        )
    match = SequenceMatcher(None, rows[0], rows[1], autojunk=False).find_longest_match()
    middle = match.size // 2
    return (begins[0] + match.a + middle, begins[1] + match.b + middle) if match.size >= _AGREED else None
