"""The Python API: a patched model is a transformers model. `import lminf_eval as lminf` shows it.

with lminf.patch(model, method="lambda", n_local=2048):
    model(ids).logits
    model.generate(ids, past_key_values=lminf.Cache(model))
scores = lminf.score(model, tokenizer, text, method="lambda")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lminf_eval.errors import UsageError
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import ScoreRequest
from lminf_eval.methods.registry import DEFAULT, MethodArgs
from lminf_eval.models.attention_module import patched_by
from lminf_eval.models.equivalence_check import Runner, checked_runner
from lminf_eval.models.families import registry
from lminf_eval.models.patching import PatchedModel


@contextmanager
def patch(model: PreTrainedModel, method: str = DEFAULT, **parameters: Any) -> Iterator[Runner]:
    """Run a transformers causal LM under an attention method inside the block.

    Inside, `model(ids)` takes inputs of any length, and `model.generate` works: greedy decoding, sampling and beam
    search, padded batches included. Pass `past_key_values=lminf.Cache(model)` for memory that does not grow with the
    sequence; without it, transformers' own cache keeps every key. No gradients are computed.

    The patched model is checked against the model itself on a few tokens. At the end of the block, the model is
    restored bit for bit.

    Args:
        model: in eval mode, with its weights.
        method: a name that `lminf.methods()` lists; "full" changes nothing.
        **parameters: the method's, for example `n_local=2048`. By default n_local is the length that the model was
            pre-trained at.

    Yields:
        the runner, for `Engine` and for those who look inside (`observed`).

    Raises:
        UsageError: for an unknown method or parameter, or a model that the method cannot run, by reason.

    Example:
        >>> with lminf.patch(model, n_local=2048):
        ...     model.generate(ids, past_key_values=lminf.Cache(model), max_new_tokens=20)
    """
    args = MethodArgs.parse({"attention": method, **parameters})
    resolved, _ = registry.checked_method(model.config, args)
    runner = checked_runner(model, resolved)
    try:
        yield runner
    finally:
        runner.restore()


@dataclass(frozen=True)
class TokenScores:
    """The scores of a text.

    Attributes:
        tokens: [N] token ids; the first one is given, the others are scored.
        log_probs: [N - 1] natural log-probability of each token after the first.
        greedy: [N - 1] whether the model would have picked that token.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    greedy: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return float(np.exp(-self.log_probs.mean()))


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[int],
    method: str | None = None,
    chunk_size: int = 2048,
    **parameters: Any,
) -> TokenScores:
    """Score a text of any length, chunk by chunk: the log-probability of each token after the first.

    Args:
        model: a transformers causal LM. Inside `lminf.patch`, it is scored as it is patched, and `method` is left out.
        tokenizer: the model's; a text begins with its BOS token, if there is one.
        text: a string, or token ids as they are.
        method, **parameters: as for `lminf.patch`; "lambda" by default.
        chunk_size: tokens that pass through the model at once; it changes memory and speed, no score.

    Raises:
        UsageError: as `lminf.patch`; for a text of fewer than two tokens; for a method inside `lminf.patch`.

    Example:
        >>> lminf.score(model, tokenizer, open("book.txt").read(), n_local=2048).perplexity
    """
    tokens = np.asarray(_encode(tokenizer, text) if isinstance(text, str) else text, dtype=np.int32)
    if len(tokens) < 2:
        raise UsageError(f"text: must have two tokens or more, and it has {len(tokens)}")
    runner = runner_of(model)
    if runner is not None and (method is not None or parameters):
        raise UsageError("method: the model is patched already; leave out the method and its parameters")
    running: AbstractContextManager[Runner] = (
        patch(model, method or DEFAULT, **parameters) if runner is None else nullcontext(runner)
    )
    with running as active:
        ((_, found),) = Engine(active, chunk_size).score([ScoreRequest(tokens, 1, rolling=True)])
    return TokenScores(tokens, found.log_probs, found.greedy)


def runner_of(model: PreTrainedModel) -> PatchedModel | None:
    """Return the runner of a patched model, or None."""
    found = patched_by(model.modules())
    return found if isinstance(found, PatchedModel) else None


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = list(tokenizer.encode(text))
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
