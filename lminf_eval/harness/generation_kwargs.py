"""A task's `generation_kwargs` read as lm-eval's `hf` reads them, and where a generation ends."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedTokenizerBase

from lminf_eval.errors import UsageError

_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names of one limit


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        max_new: tokens to generate at most; a prompt is cut so that there is room for them.
        max_length: tokens of prompt and answer at most, which takes the place of `max_new`; or None.
        until: the stop sequences.
        options: all else, by transformers' names.
    """

    max_new: int
    max_length: int | None
    until: list[str]
    options: dict[str, Any]

    def room(self, length: int) -> int:
        """Count the tokens that may follow a prompt of `length` tokens.

        Raises:
            UsageError: if there is none.
        """
        if self.max_length is None:
            return self.max_new
        if self.max_length <= length:
            raise UsageError(
                f"generation option max_length={self.max_length}: must be above the prompt's {length} tokens "
                "(max_gen_toks counts the new tokens alone)"
            )
        return self.max_length - length


def read(kwargs: Mapping[str, Any], most: int) -> Asked:
    """Read one request's `generation_kwargs`.

    Args:
        kwargs: as the task and `--gen_kwargs` give them.
        most: tokens to generate at most if `kwargs` don't say.

    Raises:
        UsageError: for an impossible value.
    """
    for name in ("temperature", "max_length", *_MOST):
        _check_number(name, kwargs.get(name))
    if not isinstance(sample := kwargs.get("do_sample"), (bool, int, type(None))):
        raise UsageError(f"generation option do_sample={sample}: must be True or False")
    until = _until(kwargs.get("until"))
    given = {name: value for name, value in kwargs.items() if name != "temperature" or value is not None}
    given |= {"until": until, "do_sample": None if sample is None else bool(sample)}
    options = dict(normalize_gen_kwargs(given, most))
    options.pop("until")
    max_new, max_length = options.pop("max_gen_toks"), options.pop("max_length", None)
    if options.get("do_sample") is False:
        options.pop("temperature", None)
    if isinstance(bias := options.get("sequence_bias"), dict):  # by tuples of tokens, which JSON can't carry
        options["sequence_bias"] = [[list(tokens), value] for tokens, value in bias.items()]
    for name, value in options.items():
        _check_plain(name, value)
    return Asked(max_new, None if max_length is None else int(max_length), until, options)


def _check_number(name: str, value: Any) -> None:
    try:
        if value is None or math.isfinite(float(value)):
            return
    except (TypeError, ValueError):
        pass
    raise UsageError(f"generation option {name}={value}: must be a number")


def _check_plain(name: str, value: Any) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise UsageError(f"generation option {name}={value}: must be plain JSON") from None


def _until(until: Any) -> list[str]:
    found = [text for text in (until if isinstance(until, (list, tuple)) else [until]) if text is not None]
    if not all(isinstance(text, str) for text in found):
        raise UsageError(f"until={until}: must be a string, a list of strings, or null for no stop sequence")
    return found


End = tuple[int, ...] | str | None  # of the reasoning: its tokens, or its text; None if a model does not reason


def reasoning_end(tokenizer: PreTrainedTokenizerBase, think: int | str | None) -> End:
    """Return what to look for as the end of the reasoning, for the model argument `think_end_token`.

    An answer's text leaves special tokens out, so a string that holds some is looked for by its tokens.
    """
    if isinstance(think, int):
        return (think,)
    if think:
        ids = tokenizer.encode(think, add_special_tokens=False)
        if not set(ids).isdisjoint(tokenizer.all_special_ids):
            return tuple(ids)
    return think or None


def without_reasoning(tokens: list[int], think: End) -> list[int]:
    """Return the tokens after the last end of the reasoning; all of them if it is a text, or not there."""
    if isinstance(think, tuple):
        for end in range(len(tokens), len(think) - 1, -1):
            if tuple(tokens[end - len(think) : end]) == think:
                return tokens[end:]
    return tokens


class Stop:
    """Says after each new token of one generation whether it ends there: at an end token or a stop sequence.

    If a model reasons first, its stop sequences count after the reasoning and the white space that follows it, where
    the text of the answer begins.

    Args:
        tokenizer: the model's.
        ends: ids of the end tokens.
        until: the stop sequences.
        think: what ends the reasoning.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        until: Sequence[str],
        think: End = None,
    ):
        self._tokenizer, self._ends, self._think = tokenizer, ends, think
        self._back = {text: self._longest(text) for text in until if text}
        self._think_back = self._longest(think) if isinstance(think, str) else 1
        self._start: int | None = 0 if think is None else None  # the token the answer begins with, once it is known
        self._head = ""  # what the token before it, the reasoning's last, holds of the answer

    def __call__(self, new: list[int]) -> bool:
        """Whether the generation ends after the tokens `new`, one more at each call."""
        if new[-1] in self._ends:
            return True
        start = self._start if self._think is None else self._answer_start(new)
        if start is None:
            return False
        return any(text in self._text(new, back, start) for text, back in self._back.items())

    def _longest(self, text: str) -> int:
        # A text may come in other tokens than it encodes to; as `hf`, look two tokens further back.
        return len(self._tokenizer.encode(text, add_special_tokens=False)) + 2

    def _text(self, new: list[int], back: int, start: int) -> str:
        """Decode the last `back` tokens of the answer, which begins at `start`."""
        first = max(start, len(new) - back)
        text = self._decoded(new[first:])
        return text if self._think is None or first > start else (self._head + text).lstrip()

    def _decoded(self, tokens: list[int]) -> str:
        return cast(str, self._tokenizer.decode(tokens))  # a list of strings for a list of lists alone

    def _answer_start(self, new: list[int]) -> int | None:
        """Return the token that the answer begins with, or None while it has not begun."""
        if self._start is None:
            self._start = self._after_reasoning(new)
        elif not self._head and self._start == len(new) - 1 and not self._text(new, 1, self._start):
            self._start = len(new)
        begun = self._start is not None and (self._head or self._start < len(new))
        return self._start if begun else None

    def _after_reasoning(self, new: list[int]) -> int | None:
        if isinstance(self._think, tuple):
            return len(new) if tuple(new[-len(self._think) :]) == self._think else None
        text = self._decoded(new[-self._think_back :])
        if self._think is None or self._think not in text:
            return None
        self._head = text.split(self._think)[-1].lstrip()
        return len(new)
