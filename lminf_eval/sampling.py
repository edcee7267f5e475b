"""How the next token is picked: transformers' own logits processors, for the options that make sense here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lminf_eval.errors import UsageError

# option -> (the value that changes nothing, what applies it); in the order transformers' own `generate` applies them.
_ALWAYS = {
    "repetition_penalty": (1.0, RepetitionPenaltyLogitsProcessor),
    "no_repeat_ngram_size": (0, NoRepeatNGramLogitsProcessor),
}
_SAMPLED = {
    "temperature": (1.0, TemperatureLogitsWarper),
    "top_k": (0, TopKLogitsWarper),
    "top_p": (1.0, TopPLogitsWarper),
    "min_p": (0.0, MinPLogitsWarper),
}
_OPTIONS = {"do_sample", *_ALWAYS, *_SAMPLED}

Choose = Callable[[list[int], torch.Tensor], int]


def chooser(options: dict[str, Any], defaults: GenerationConfig) -> Choose | None:
    """What picks the next token from (tokens so far, logits [V]); None for plain greedy decoding.

    Args:
        options: a request's generation options, normalized by lm-eval (no `until`, no `max_gen_toks`).
        defaults: the model's own generation config, which fills in what `options` leave open, as in `generate`.

    Raises:
        UsageError: for an option that isn't supported, naming it and those that are.
    """
    unknown = {name for name, value in options.items() if name not in _OPTIONS and value is not None}
    if unknown:
        raise UsageError(
            f"generation option {sorted(unknown)[0]!r} is not supported; allowed: {', '.join(sorted(_OPTIONS))}"
        )
    options = {name: value for name, value in options.items() if name in _OPTIONS and value is not None}
    sample = bool(options.get("do_sample", False))
    processors = LogitsProcessorList()
    for name, (neutral, processor) in {**_ALWAYS, **(_SAMPLED if sample else {})}.items():
        value = options.get(name, getattr(defaults, name, None))
        if value is not None and value != neutral:
            processors.append(processor(copy.copy(value)))
    if not sample and not processors:
        return None

    def choose(tokens: list[int], logits_V: torch.Tensor) -> int:
        scores_1V = processors(torch.tensor([tokens], device=logits_V.device), logits_V[None].float())
        if sample:
            return int(torch.multinomial(scores_1V.softmax(-1), 1))
        return int(scores_1V.argmax(-1))

    return choose
