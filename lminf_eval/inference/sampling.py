"""How the next token is picked: by transformers' own logits processors, merged and ordered as `generate` does it.

Shapes: L tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PretrainedConfig, WatermarkingConfig

from lminf_eval.errors import UsageError, first_line
from lminf_eval.utils.names import closest

# Options that ask for more than one sequence, one pass of one model for each token -> the values that ask for nothing.
_ONE_PASS = {
    "assistant_early_exit": (None,),
    "constraints": (None,),
    "dola_layers": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (1, None),
    "max_time": (None,),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "penalty_alpha": (0, None),
    "prompt_lookup_num_tokens": (None,),
    "token_healing": (False, None),
    "use_mtp": (False, None),
}

_SHARES = ("epsilon_cutoff", "eta_cutoff", "top_p", "typical_p")  # transformers ignores those above 1

# Picks the next token from (new tokens so far, logits [V]); None if the logits hold NaN.
Sample = Callable[[Sequence[int], torch.Tensor], "int | None"]


def most_likely(new: Sequence[int], logits_V: torch.Tensor) -> int | None:
    """Pick the token with the highest logit, a `Sample`."""
    highest, likely = logits_V.max(-1)  # NaN wins if there is one
    return None if highest.isnan() else int(likely)


def _check_names(options: dict[str, Any]) -> None:
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in options.keys() - set(known):
        near = closest(name, [*known, "until", "max_gen_toks"])
        raise UsageError(
            f"generation option {name}={options[name]}: must be until, max_gen_toks or one of transformers' "
            f"generate{near}"
        )


def _check_shares(options: dict[str, Any]) -> None:
    for name in _SHARES:
        if isinstance(value := options.get(name), (int, float)) and not 0 <= value <= 1:
            raise UsageError(f"generation option {name}={value}: must be between 0 and 1")


class Decoding(GenerationMixin):
    """A model's rules for picking tokens, known from its configs alone: no weights are needed.

    Args:
        config: the model's config.
        generation_config: its generation config, which fills in what a request leaves open.
    """

    def __init__(self, config: PretrainedConfig, generation_config: GenerationConfig):
        self.config, self.generation_config = config, generation_config
        self._merged: dict[str, GenerationConfig] = {}  # by a request's options, which many requests share
        self._checked: set[str] = set()

    def settle(self, options: dict[str, Any], length: int = 2, max_new: int = 1) -> GenerationConfig:
        """Merge a request's options over the model's and transformers' defaults, as `generate` does.

        Args:
            options: generation options by transformers' names; None overrides the model's value with none.
            length: tokens of the prompt.
            max_new: tokens to generate at most.
        """
        key = json.dumps(options, sort_keys=True)
        if key not in self._merged:
            self._merged[key] = self._merge(options)
        settled = copy.copy(self._merged[key])
        settled.max_length = length + max_new
        if settled.min_new_tokens is not None:
            settled.min_length = length + settled.min_new_tokens
        return settled

    def _merge(self, options: dict[str, Any]) -> GenerationConfig:
        options = {"pad_token_id": 0} | options  # nothing is padded, but some releases warn if there is none
        if isinstance(mark := options.get("watermarking_config"), dict):
            options["watermarking_config"] = WatermarkingConfig(**mark)  # some releases take no dictionary
        merged, _ = self._mixin._prepare_generation_config(None, **options)
        for name, default in merged._get_default_generation_params().items():
            if isinstance(default, float) and type(getattr(merged, name, None)) is int:
                setattr(merged, name, float(getattr(merged, name)))  # the processors refuse a temperature of 2
        return merged

    def check(self, options: dict[str, Any]) -> None:
        """Refuse options, of a request or of the model's own generation config, that can't be followed.

        Raises:
            UsageError: naming the option, its value and what is allowed.
        """
        key = json.dumps(options, sort_keys=True)
        if key in self._checked:
            return
        _check_names(options)
        _check_shares(options)
        try:
            self._refuse_many_passes(options)
            self._rehearse(options)
        except UsageError:
            raise
        except Exception as error:  # of any kind: transformers does not check types
            raise self._blame(options, error) from error
        self._checked.add(key)

    def ends(self, options: dict[str, Any]) -> list[int]:
        """List the token ids that end a generation."""
        ends = self.settle(options).eos_token_id
        return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]

    def stop_strings(self, options: dict[str, Any]) -> list[str]:
        """List the strings that end a generation and stay in its text."""
        strings = self.settle(options).stop_strings or []
        return [strings] if isinstance(strings, str) else list(strings)

    def sampler(
        self, options: dict[str, Any], prompt: Sequence[int] | np.ndarray, max_new: int, request: str = ""
    ) -> Callable[[torch.device], Sample] | None:
        """Make what begins one sequence on a device; None for plain greedy decoding.

        Args:
            options: as `check` takes them.
            prompt: its tokens.
            max_new: tokens to generate at most.
            request: the text that, with torch's seed, seeds the sampling, so that the answer to a request does not
                depend on other requests.
        """
        settled = self.settle(options, len(prompt), max_new)
        if not settled.do_sample and not self._processors(settled, torch.zeros(1, 2, dtype=torch.long)):
            return None
        seed = f"{torch.initial_seed()} {request}" if settled.do_sample else None
        return partial(self._begin, settled, prompt, max_new, seed)

    def _begin(
        self, settled: Any, prompt: Sequence[int] | np.ndarray, max_new: int, seed: str | None, device: torch.device
    ) -> Sample:
        tokens_1L = torch.zeros(1, len(prompt) + max_new, dtype=torch.long, device=device)
        tokens_1L[0, : len(prompt)] = torch.from_numpy(np.array(prompt, dtype=np.int64))
        processors = self._processors(settled, tokens_1L[:, : len(prompt)])
        return Sampler(processors, tokens_1L, len(prompt), seed)

    def _processors(self, settled: GenerationConfig, prompt_1L: torch.Tensor) -> LogitsProcessorList:
        self._mixin._prepare_special_tokens(settled, True, device=prompt_1L.device)
        return self._mixin._get_logits_processor(
            generation_config=settled,
            input_ids_seq_length=prompt_1L.shape[1],
            encoder_input_ids=prompt_1L,  # of a decoder, `generate` takes the prompt for the encoder's input
            device=prompt_1L.device,
            model_kwargs={},
        )

    @property
    def _mixin(self) -> Any:
        """Itself, for the methods that transformers declares for models with weights alone."""
        return self

    def _refuse_many_passes(self, options: dict[str, Any]) -> None:
        for name, allowed in _ONE_PASS.items():
            value = options.get(name, getattr(self.generation_config, name, None))
            if value not in allowed:
                raise UsageError(
                    f"{self._named(name, value, options)}: must be {' or '.join(map(str, allowed))}; "
                    "greedy decoding and sampling of one sequence work, with one pass for each token"
                )
        mode = self.settle(options).get_generation_mode()
        if mode not in ("greedy_search", "sample"):
            raise UsageError(f"generation options {options}: they mean {mode.value}; greedy_search and sample work")

    def _rehearse(self, options: dict[str, Any]) -> None:
        """Apply all processors once to a made-up prompt and logits: their errors come before the weights are read."""
        vocabulary = getattr(self.config.get_text_config(), "vocab_size", 2)
        "".join(self.stop_strings(options))
        prompt_1L = torch.zeros(1, 2, dtype=torch.long)
        scores = torch.zeros(1, vocabulary)
        # transformers asks for a LongTensor, which for torch's stubs no tensor is.
        self._processors(self.settle(options), prompt_1L)(prompt_1L, scores)  # type: ignore[arg-type]

    def _blame(self, options: dict[str, Any], error: Exception) -> UsageError:
        """Find the option that fails even alone."""
        for name, value in {**self.generation_config.to_diff_dict(), **options}.items():
            alone = self._error_of({"do_sample": bool(options.get("do_sample")), name: value})
            if alone is not None:
                return UsageError(f"{self._named(name, value, options)}: {first_line(alone)}")
        return UsageError(f"generation options {options}: {first_line(error)}")

    def _error_of(self, options: dict[str, Any]) -> Exception | None:
        """Return what a model that sets nothing itself raises for these options."""
        try:
            Decoding(self.config, GenerationConfig())._rehearse({"eos_token_id": 0} | options)
        except Exception as error:
            return error
        return None

    def _named(self, name: str, value: Any, options: dict[str, Any]) -> str:
        source = (
            "" if name in options else f" (of the model's generation_config.json; {name} in gen_kwargs overrides it)"
        )
        return f"generation option {name}={value}{source}"


class Sampler:
    """Picks the next tokens of one sequence.

    Args:
        processors: what turns logits into scores.
        tokens_1L: room for all its tokens; the prompt's are there.
        length: tokens of the prompt.
        seed: of its draws; None for the token with the highest score.
    """

    def __init__(self, processors: LogitsProcessorList, tokens_1L: torch.Tensor, length: int, seed: str | None):
        self.processors, self.tokens_1L, self.length, self.generator = processors, tokens_1L, length, None
        if seed is not None:
            digest = hashlib.sha256(seed.encode(errors="surrogatepass")).digest()[:8]
            self.generator = torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))

    def __call__(self, new: Sequence[int], logits_V: torch.Tensor) -> int | None:
        """Pick the token after `new`, one token longer at each call; None if no score is a number to go by."""
        length = self.length + len(new)
        if new:
            self.tokens_1L[0, length - 1] = new[-1]
        seen_1L, logits_1V = self.tokens_1L[:, :length], logits_V[None].float()
        scores_V = self.processors(seen_1L, logits_1V)[0]  # type: ignore[arg-type]  # as in `_rehearse`
        if self.generator is None:
            return most_likely(new, scores_V)
        probability_V = scores_V.softmax(-1).cpu()
        if probability_V.isnan().any():
            return None
        return int(torch.multinomial(probability_V, 1, generator=self.generator))
