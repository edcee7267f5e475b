"""Facts hidden in a long text, and a question about one or several of them.

The kinds are those of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3), and the lookup in a JSON object of "Lost
in the Middle" (Liu et al. 2023, arXiv 2307.03172, section 3). Sentences and names are our own. The text around the
facts is the reference manual that every CPython carries, so nothing is downloaded. It is the same in all documents of a
task, which so share their beginnings.
"""

from __future__ import annotations

import logging
import random
import re
import string
import uuid
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset

from lminf_eval.errors import UsageError
from lminf_eval.tasks.task_metadata import read_wanted
from lminf_eval.tasks.tokenizer import load_tokenizer

logger = logging.getLogger(f"lm_eval.{__name__}")  # under lm-eval's own, which shows it

_SEVERAL = 4  # values, or names, of the kinds that ask for several; the needles among which `multikey` asks for one
_HOPS = 4  # variables that take the first one's value, one from the other
_FIRST = (
    "amber bold calm cedar clear copper coral crimson distant early forest gentle golden green hidden high "
    "ivory late lower marble narrow northern old open pale quiet rapid round silver small stone upper"
)
_SECOND = (
    "anchor arch barn bay bridge canyon castle cliff corner cove creek dune farm ferry field fort "
    "garden gate grove harbor hill island lake lane market meadow mill pass pond port ridge tower"
)
_PART_END = re.compile(r"(?<=[.!?]\s)(?=[A-Z])|(?<=\n\n)")


@dataclass(frozen=True)
class _Facts:
    """What a document hides, and what it asks.

    Attributes:
        lines: the facts with the depths at which they lie, 0 to 1; the first one is that whose depth is recorded, if
            the question is about one alone.
        question: the prompt's end.
        answers: what a right answer contains.
        one: whether the question is about one fact alone.
    """

    lines: list[tuple[str, float]]
    question: str
    answers: list[str]
    one: bool = False


# What draws the facts of a document, if the one that is asked for lies at a depth.
_Draw = Callable[[random.Random, float], _Facts]
# What writes a prompt with so many parts between its facts: up to the fact whose depth is recorded, and from there on.
_Write = Callable[[int], tuple[str, str]]
# What hides facts in a text; of the same text in each document, if its parts are drawn at random.
_Hide = Callable[[_Facts, random.Random], _Write]


def single(**metadata: Any) -> dict[str, Dataset]:
    """Build documents with one number, which is asked for (see `_build`)."""
    return _build("needle_single", _draw_single, metadata)


def multikey(**metadata: Any) -> dict[str, Dataset]:
    """Build documents with four numbers of different names, one of which is asked for (see `_build`)."""
    return _build("needle_multikey", _draw_multikey, metadata)


def multivalue(**metadata: Any) -> dict[str, Dataset]:
    """Build documents with four numbers of one name, all of which are asked for (see `_build`)."""
    return _build("needle_multivalue", _draw_multivalue, metadata)


def multiquery(**metadata: Any) -> dict[str, Dataset]:
    """Build documents with four numbers of different names, all of which are asked for (see `_build`)."""
    return _build("needle_multiquery", _draw_multiquery, metadata)


def variable_tracking(**metadata: Any) -> dict[str, Dataset]:
    """Build documents in which four variables take the value of a fifth, one from the other (see `_build`)."""
    return _build("variable_tracking", _draw_chain, metadata)


def key_value(**metadata: Any) -> dict[str, Dataset]:
    """Build documents that are one JSON object of random keys and values, one of which is asked for (see `_build`)."""
    return _build("kv_retrieval", _draw_pair, metadata, _pairs)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return `acc`, the share of `answers` that the answer contains, whatever their case (RULER's string match)."""
    answer = results[0].lower()
    return {"acc": sum(expected.lower() in answer for expected in doc["answers"]) / len(doc["answers"])}


def _build(task: str, draw: _Draw, metadata: dict[str, Any], hide: _Hide | None = None) -> dict[str, Dataset]:
    """Build the documents of a task, for lm-eval's `custom_dataset`.

    Metadata: see `read_wanted`; and the model arguments that name the tokenizer. A seed gives the same facts and depths
    at every length.

    A document has `input`, the prompt; `answers`, and `key`, the same as one text; `length`, the target, and
    `n_tokens`, the prompt's true number of tokens, special tokens included. If it asks for one fact alone,
    `depth_target` is the share of the text before it, in characters or pairs, and `depth` the share of the prompt's
    tokens.

    Raises:
        UsageError: a value is out of range, or the length is too short for the facts alone.
    """
    wanted, tokenizer = read_wanted(task, metadata), load_tokenizer(**metadata)
    docs, parts = [], 1
    for number, depth in enumerate(wanted.depths):
        facts = draw(random.Random(f"{task} {wanted.seed} {number}"), depth)
        write = (hide or _prose)(facts, random.Random(f"{task} {wanted.seed}"))

        def count(parts: int, write: _Write = write) -> int:
            return len(tokenizer.encode("".join(write(parts))))

        parts, n_tokens = _largest(count, wanted.length, max(1, parts), f"{task} length={wanted.length}")
        before, after = write(parts)
        doc: dict[str, Any] = {"input": before + after, "key": ", ".join(facts.answers), "answers": facts.answers}
        doc |= {"length": wanted.length, "n_tokens": n_tokens}
        if facts.one:
            doc |= {"depth_target": depth, "depth": len(tokenizer.encode(before)) / n_tokens}
        docs.append(doc)
    sizes = [doc["n_tokens"] for doc in docs]
    logger.info(
        "%s: %d documents of %d to %d tokens, target %d", task, len(docs), min(sizes), max(sizes), wanted.length
    )
    return {"test": Dataset.from_list(docs)}


def _largest(count: Callable[[int], int], length: int, guess: int, what: str) -> tuple[int, int]:
    """Return the most parts with which `count` stays within `length`, and the count.

    Found by interpolation from a guess of 1 or more, since each count encodes a whole prompt.
    """
    low, low_count = 0, count(0)
    if low_count > length:
        raise UsageError(f"{what} is too short for its own prompt: the shortest possible is {low_count}")
    high = length + 1  # a part has a token or more
    while high - low > 1:
        found = count(guess)
        cost = max(1.0, (found - low_count) / (guess - low))
        if found <= length:
            low, low_count = guess, found
        else:
            high = guess
        guess = min(high - 1, max(low + 1, low + int((length - low_count) / cost)))
    return low, low_count


def _prose(facts: _Facts, rng: random.Random) -> _Write:
    """Write the facts between sentences and paragraphs of the reference manual, which begins again at its end."""

    def write(parts: int) -> tuple[str, str]:
        manual = _manual() * (parts // len(_manual()) + 1)
        ends = [0, *accumulate(len(part) for part in manual[:parts])]
        texts: list[str] = []
        start = here = 0
        places = [(bisect_left(ends, depth * ends[-1]), number) for number, (_, depth) in enumerate(facts.lines)]
        for place, number in sorted(places):
            texts += manual[start:place]
            here = len(texts) if number == 0 else here
            texts.append(f"{facts.lines[number][0]} ")
            start = place
        texts += manual[start:parts]
        head = "Facts are hidden in the text below. Remember them: a question about them follows the text.\n"
        return head + "".join(texts[:here]), "".join(texts[here:]) + f"\n{facts.question}"

    return write


def _pairs(facts: _Facts, rng: random.Random) -> _Write:
    """Write a JSON object of random pairs, the fact among them; `rng` draws the others."""
    others: list[str] = []

    def write(parts: int) -> tuple[str, str]:
        others.extend(_pair(*_uuids(rng, 2)) for _ in range(parts - len(others)))
        ((fact, depth),) = facts.lines
        place = int(depth * parts + 0.5)
        head = "Below is a JSON object. Remember its values: a question about one of them follows.\n{"
        return (
            head + "".join(f"{pair},\n" for pair in others[:place]),
            ",\n".join([fact, *others[place:parts]]) + "}\n" + facts.question,
        )

    return write


@cache
def _manual() -> list[str]:
    """Return the manual's sentences and paragraphs, with the white space that ends each of them."""
    return [part for text in topics.values() for part in _PART_END.split(text.strip() + "\n\n") if part.strip()]


def _names(rng: random.Random, count: int) -> list[str]:
    return rng.sample([f"{first} {second}" for first in _FIRST.split() for second in _SECOND.split()], count)


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _number_of(name: str, number: str) -> str:
    return f"The access number of {name} is {number}."


def _draw_single(rng: random.Random, depth: float) -> _Facts:
    return _ask_one(_names(rng, 1), _numbers(rng, 1), [depth])


def _draw_multikey(rng: random.Random, depth: float) -> _Facts:
    names, numbers = _names(rng, _SEVERAL), _numbers(rng, _SEVERAL)
    return _ask_one(names, numbers, [depth, *(rng.random() for _ in names[1:])])


def _ask_one(names: list[str], numbers: list[str], depths: list[float]) -> _Facts:
    question = f"What is the access number of {names[0]} in the text above? The access number of {names[0]} is"
    lines = [(_number_of(name, number), at) for name, number, at in zip(names, numbers, depths, strict=True)]
    return _Facts(lines, question, numbers[:1], one=True)


def _draw_multivalue(rng: random.Random, depth: float) -> _Facts:
    (name,), numbers = _names(rng, 1), _numbers(rng, _SEVERAL)
    question = (
        f"What are all {_SEVERAL} access numbers of {name} in the text above? "
        f"The {_SEVERAL} access numbers of {name} are"
    )
    return _Facts([(_number_of(name, number), rng.random()) for number in numbers], question, numbers)


def _draw_multiquery(rng: random.Random, depth: float) -> _Facts:
    names, numbers = _names(rng, _SEVERAL), _numbers(rng, _SEVERAL)
    several = f"{', '.join(names[:-1])} and {names[-1]}"
    question = f"What are the access numbers of {several} in the text above? The access numbers of {several} are"
    lines = [(_number_of(name, number), rng.random()) for name, number in zip(names, numbers, strict=True)]
    return _Facts(lines, question, numbers)


def _draw_chain(rng: random.Random, depth: float) -> _Facts:
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    (value,) = _numbers(rng, 1)
    depths = sorted(rng.random() for _ in names)
    texts = [f"Variable {names[0]} is set to {value}."]
    texts += [f"Variable {after} is set to variable {before}." for before, after in pairwise(names)]
    question = (
        f"Which {len(names)} variables in the text above have the value {value}, directly or through other variables? "
        f"The {len(names)} variables with the value {value} are"
    )
    return _Facts(list(zip(texts, depths, strict=True)), question, names)


def _draw_pair(rng: random.Random, depth: float) -> _Facts:
    key, value = _uuids(rng, 2)
    return _Facts([(_pair(key, value), depth)], f'The value of the key "{key}" is "', [value], one=True)


def _uuids(rng: random.Random, count: int) -> list[str]:
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def _pair(key: str, value: str) -> str:
    return f'"{key}": "{value}"'
