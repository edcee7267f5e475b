"""The passkey task: a five-digit number hidden in filler text, to be recalled at its end.

The prompt is that of Mohtashami and Jaggi, "Landmark Attention" (2023, arXiv 2305.16300), which LM-Infinite
(arXiv 2308.16137) evaluates on too. Here it is sized in the evaluated model's own tokens.
"""

import logging
import random
import re
from bisect import bisect_right
from typing import Any

from datasets import Dataset

from lminf_eval.errors import UsageError
from lminf_eval.tasks.task_metadata import read_wanted
from lminf_eval.tasks.tokenizer import TaskTokenizer, load_tokenizer

logger = logging.getLogger(f"lm_eval.{__name__}")  # under lm-eval's own, which shows it

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
_KEY = "The pass key is {key}. Remember it. {key} is the pass key."
# Digits, or groups of three after a comma, an apostrophe or a space.
_NUMBER = re.compile(r"\d{1,3}(?:[,'’ \u00a0\u2009\u202f]\d{3})+(?!\d)|\d+", re.ASCII)
_QUESTION = "What is the pass key? The pass key is"


def build(**metadata: Any) -> dict[str, Dataset]:
    """Build the documents of a passkey task, for lm-eval's `custom_dataset`.

    Metadata: `length` in tokens; `documents` (20); `depths`, how many evenly spread depths they share (one each);
    `seed` (0); and the model arguments that name the tokenizer. A seed gives the same keys and depths at every length.

    A document has `key`; `length`, the target, and `n_tokens`, the prompt's true number of tokens, special tokens
    included; `depth_target`, the fraction of the filler before the key, and `depth`, the fraction of the prompt's
    tokens before the sentence that tells the key; `before` and `after`, the numbers of filler sentences.

    Raises:
        UsageError: a value is out of range, or the length is too short for the prompt without any filler.
    """
    wanted = read_wanted("passkey", metadata)
    length, documents = wanted.length, len(wanted.depths)
    tokenizer = load_tokenizer(**metadata)
    rng = random.Random(wanted.seed)
    keys = [str(rng.randrange(10_000, 100_000)) for _ in range(documents)]
    shortest = max(len(tokenizer.encode(_prompt(key, 0, 0))) for key in set(keys))
    if length < shortest:
        raise UsageError(
            f"passkey length={length} is too short for its own prompt: the shortest possible is {shortest}"
        )

    sizer = _Sizer(tokenizer, length)
    docs = [sizer.document(key, depth) for key, depth in zip(keys, wanted.depths, strict=True)]
    sizes = [doc["n_tokens"] for doc in docs]
    logger.info("passkey: %d documents of %d to %d tokens, target %d", documents, min(sizes), max(sizes), length)
    return {"test": Dataset.from_list(docs)}


def prompt(doc: dict[str, Any]) -> str:
    """Return the text of a document of `build`."""
    return _prompt(doc["key"], doc["before"], doc["after"])


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return `acc`: 1 if the first number of five digits in the answer is the key; "71,432" is such a number, too."""
    numbers = (re.sub(r"\D", "", found) for found in _NUMBER.findall(results[0]))
    return {"acc": float(next((number for number in numbers if len(number) == 5), None) == doc["key"])}


def _filler(sentences: int) -> str:
    cycles, rest = divmod(sentences, len(_FILLER))
    return " ".join([" ".join(_FILLER)] * cycles + list(_FILLER[:rest]))


def _prompt(key: str, before: int, after: int) -> str:
    lines = (_TASK, _filler(before), _KEY.format(key=key), _filler(after), _QUESTION)
    return "\n".join(line for line in lines if line)


class _Sizer:
    """Finds the most filler that keeps a prompt within `length` tokens.

    In most tokenizers a filler sentence costs the same number of tokens wherever it stands, which a few short prompts
    reveal. The size that follows is checked on the whole prompt, and corrected if a tokenizer does otherwise.
    """

    def __init__(self, tokenizer: TaskTokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length
        cycle = len(_FILLER)
        counts = [self._count("0", cycle + i, cycle) for i in range(cycle + 1)]
        self.cycle_cost = counts[-1] - counts[0]
        self.partial_cost = [count - counts[0] for count in counts[:-1]]
        self.no_filler_cost = self._count("0", 0, cycle) - counts[0] + self.cycle_cost  # its line is left out too
        head = _prompt("0", cycle, cycle).partition("\n" + _KEY.format(key="0"))[0]
        self.head_cost = len(tokenizer.encode(head)) - self.cycle_cost

    def document(self, key: str, depth: float) -> dict[str, Any]:
        bare = self._count(key, len(_FILLER), len(_FILLER)) - 2 * self.cycle_cost

        def expected(total: int) -> int:
            before, after = _divide(total, depth)
            return bare + self._cost(before) + self._cost(after)

        def counted(total: int) -> int:
            return self._count(key, *_divide(total, depth))

        total = bisect_right(range(1, self.length), self.length, key=expected)
        n_tokens = counted(total)
        if n_tokens != expected(total):
            total = max(0, total + (self.length - n_tokens) * len(_FILLER) // self.cycle_cost)
            n_tokens = counted(total)
            while n_tokens > self.length:
                total -= 1
                n_tokens = counted(total)
            while (more := counted(total + 1)) <= self.length:
                total, n_tokens = total + 1, more
        before, after = _divide(total, depth)
        depth_tokens = self.head_cost + self._cost(before)
        return {
            "key": key,
            "length": self.length,
            "n_tokens": n_tokens,
            "depth_target": depth,
            "depth": depth_tokens / n_tokens,
            "before": before,
            "after": after,
        }

    def _cost(self, sentences: int) -> int:
        if sentences == 0:
            return self.no_filler_cost
        cycles, rest = divmod(sentences, len(_FILLER))
        return cycles * self.cycle_cost + self.partial_cost[rest]

    def _count(self, key: str, before: int, after: int) -> int:
        return len(self.tokenizer.encode(_prompt(key, before, after)))


def _divide(total: int, depth: float) -> tuple[int, int]:
    before = int(depth * total + 0.5)
    return before, total - before
