"""How the next token is picked: transformers' own logits processors, for the options that make sense here."""

from __future__ import annotations

import hashlib
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
_FALLBACK = {"top_k": 50}  # of transformers' `generate`, where neither request nor model say otherwise
_FIXED = {"num_beams": 1, "num_return_sequences": 1}  # allowed at the one value that we do anyway
_OPTIONS = {"do_sample", *_ALWAYS, *_SAMPLED, *_FIXED}

Choose = Callable[[list[int], torch.Tensor], int]


def check_options(options: dict[str, Any]) -> None:
    """Refuse options that `chooser` doesn't know.

    Raises:
        UsageError: naming the option and those that are supported.
    """
    for name, value in options.items():
        if name not in _OPTIONS and value is not None:
            known = ", ".join(sorted({*_OPTIONS, "until", "max_gen_toks"}))
            raise UsageError(f"generation option {name}={value} is not supported; allowed: {known}")
        if name in _FIXED and value not in (None, _FIXED[name]):
            raise UsageError(f"generation option {name}={value}: only {name}={_FIXED[name]} is supported")


def chooser(options: dict[str, Any], defaults: GenerationConfig, request: str = "") -> Choose | None:
    """What picks the next token from (tokens so far, logits [V]); None for plain greedy decoding.

    Args:
        options: a request's generation options, normalized by lm-eval (no `until`, no `max_gen_toks`).
        defaults: the model's own generation config, which fills in what `options` leave open, as in `generate`.
        request: the text that, with torch's seed, seeds the sampling: so what a request is answered does not depend on
            those answered before or beside it.

    Raises:
        UsageError: for an option that isn't supported, naming it and those that are, or an impossible value.
    """
    check_options(options)
    options = {name: value for name, value in options.items() if value is not None}
    sample = bool(options.get("do_sample", False))
    processors = LogitsProcessorList()
    for name, (neutral, processor) in {**_ALWAYS, **(_SAMPLED if sample else {})}.items():
        value = options.get(name, getattr(defaults, name, None))
        value = _FALLBACK.get(name) if value is None else value
        if value is None or value == neutral:
            continue
        try:
            processors.append(processor(type(neutral)(value)))
        except ValueError as error:
            raise UsageError(f"generation option {name}={value}: {error}") from None
    if not sample and not processors:
        return None
    seed = hashlib.sha256(f"{torch.initial_seed()} {request}".encode(errors="surrogatepass")).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big", signed=True))

    def choose(tokens: list[int], logits_V: torch.Tensor) -> int:
        scores_1V = processors(torch.tensor([tokens], device=logits_V.device), logits_V[None].float())
        if sample:
            return int(torch.multinomial(scores_1V.softmax(-1).cpu(), 1, generator=generator))
        return int(scores_1V.argmax(-1))

    return choose
