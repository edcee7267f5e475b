"""What the metadata of a task with made-up documents says: how long they are, how many, and where their facts lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lminf_eval.errors import UsageError

# Of the tasks whose documents are made up, whatever the length in their names: new tokens of an answer, at most.
MAX_NEW_TOKENS = {
    "passkey": 16,
    "needle_single": 16,
    "needle_multikey": 16,
    "needle_multivalue": 64,
    "needle_multiquery": 64,
    "variable_tracking": 48,
    "kv_retrieval": 64,
}
CONTINUATION = 100  # new tokens of a text that is continued
DOCUMENTS = 20  # of each task with made-up documents, unless the metadata say otherwise


@dataclass(frozen=True)
class Wanted:
    """The documents that a task is to make.

    Attributes:
        length: tokens of each prompt, at most.
        depths: of each document, the share of its text before the fact that is asked for.
        seed: of everything that is drawn.
    """

    length: int
    depths: list[float]
    seed: int


def read_wanted(task: str, metadata: dict[str, Any]) -> Wanted:
    """Return what `length`, `documents` (20), `depths` (one a document) and `seed` (0) ask for.

    Raises:
        UsageError: a value is out of range.
    """
    length: Any = metadata.get("length")
    documents = metadata.get("documents", DOCUMENTS)
    depths = metadata.get("depths", documents)
    for name, value in (("length", length), ("documents", documents), ("depths", depths)):
        if type(value) is not int or value < 1:
            raise UsageError(f"{task} {name}={value!r}: a whole number from 1 up is needed")
    if depths > documents:
        raise UsageError(f"{task} depths={depths}: at most one depth a document, and documents={documents}")
    seed = metadata.get("seed", 0)
    if type(seed) is not int:
        raise UsageError(f"{task} seed={seed!r}: a whole number is needed")
    spread = spread_depths(depths)
    return Wanted(length, [spread[number % depths] for number in range(documents)], seed)


def spread_depths(count: int) -> list[float]:
    """Return `count` depths from 0 to 1, evenly spread, as is each prefix of the list; a single one is the middle.

    The order is that of bit-reversed indices (van der Corput): 0, then about a half, a quarter, three quarters, ...
    """
    if count == 1:
        return [0.5]
    bits = (count - 1).bit_length()
    return [i / (count - 1) for i in sorted(range(count), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))]
