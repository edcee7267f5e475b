"""Generation as lm-eval asks for it: contexts and options into requests, and new tokens into text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.models.utils import postprocess_generated_text

from lminf_eval.errors import UsageError
from lminf_eval.harness import generation_kwargs
from lminf_eval.harness.late_hflm import LateHFLM
from lminf_eval.inference.requests import GenerateRequest
from lminf_eval.inference.sampling import Sample
from lminf_eval.tasks.chunked_tokenization import encode


class GenerationRequests:
    """Makes requests for a model's tokenizer and rules of generation, and says what they mean (`generation.Rules`).

    Args:
        lm: has the tokenizer and the rules.
        key: (kind, tokens, options) -> the journal's key.
    """

    def __init__(self, lm: LateHFLM, key: Callable[[str, Sequence[int] | np.ndarray, Any], str]):
        self._lm, self._key = lm, key

    def request(self, context: str, kwargs: dict[str, Any], time: int) -> GenerateRequest:
        """Make the request to continue `context`, which is asked for the `time`-th time.

        Raises:
            UsageError: for an impossible option, or a context without tokens.
        """
        lm, decoding = self._lm, self._lm.decoding
        most = decoding.generation_config.max_new_tokens or lm.max_gen_toks
        asked = generation_kwargs.read(kwargs, most)  # whose own limit wins; with `hf` the model's would
        decoding.check(asked.options)
        if not 0 < asked.max_new < lm.limit:
            raise UsageError(f"max_gen_toks={asked.max_new}: must be at least 1 and less than max_length={lm.limit}")
        tokens = self._prompt(context, asked.max_new)
        until = list(dict.fromkeys([*asked.until, *self._end_texts(asked.options)]))
        draw = [torch.initial_seed(), time] if asked.options["do_sample"] else None
        max_new = asked.room(len(tokens))
        key = self._key("generate", tokens, [max_new, until, asked.options, draw])
        seed = f"{context} {time}" if draw else ""
        return GenerateRequest(np.asarray(tokens, dtype=np.int32), max_new, until, asked.options, seed, key)

    def _prompt(self, context: str, max_new: int) -> Sequence[int] | np.ndarray:
        lm = self._lm

        def encode_all(text: str) -> list[int]:
            ids_1S, _ = lm.tok_batch_encode([text], truncation=lm.truncation)
            return ids_1S[0].tolist()

        tokens = encode_all(context) if lm.truncation else encode(lm.tokenizer, context, encode_all)
        if lm._max_length:
            tokens = lm.truncate.cut(np.asarray(tokens), lm._max_length - max_new)
        if not len(tokens):
            raise UsageError("a context encodes to no tokens; generation needs at least one")
        return tokens

    def _end_texts(self, options: dict[str, Any]) -> list[str]:
        """Decode the end tokens: the tokenizer's own as with `hf`, else those of the generation config."""
        lm = self._lm
        ends = lm.decoding.ends(options) if lm.eot_token_id is None else [lm.eot_token_id]
        if not ends:
            raise UsageError(
                f"tokenizer={lm.tokenizer.name_or_path}: it has no eos_token, and the model's generation_config no "
                "eos_token_id; pass eos_token_id=<id> in gen_kwargs, or a tokenizer with one"
            )
        return [lm.tok_decode(end, skip_special_tokens=False) for end in ends]

    def should_stop(self, request: GenerateRequest) -> Callable[[list[int]], bool]:
        """Return what says after each new token whether the generation ends there."""
        lm, options = self._lm, dict(request.options)
        ends = {lm.eot_token_id, *lm.decoding.ends(options)}
        until = [*request.until, *lm.decoding.stop_strings(options)]
        return generation_kwargs.Stop(lm.tokenizer, ends, until, self._think)

    def sampler(self, request: GenerateRequest, device: torch.device) -> Sample | None:
        """Return what picks each next token on a device; None for the most likely one."""
        begin = self._lm.decoding.sampler(dict(request.options), request.tokens, request.max_new_tokens, request.draw)
        return None if begin is None else begin(device)

    def text(self, request: GenerateRequest, tokens: list[int]) -> str:
        """Decode new tokens, without the reasoning and from the first stop sequence on."""
        think = self._think
        text = self._lm.tok_decode(generation_kwargs.without_reasoning(tokens, think))
        if isinstance(think, tuple):
            text = text.lstrip()
        return postprocess_generated_text(text, list(request.until), think if isinstance(think, str) else None)

    @property
    def _think(self) -> generation_kwargs.End:
        return generation_kwargs.reasoning_end(self._lm.tokenizer, self._lm.think_end_token)
