"""The check at load that makes every unknown family safe: if the method hides nothing, what runs must be the model.

For Λ, two tiny passes compare, layer by layer, the queries and keys that the model rotates itself with those that we
rotate for it; so a layer without positions is found, and a family whose keys exist only rotated is refused. Then logits
are compared: with the model's own forward below n_local, and beyond it whole against chunks. For `full`, the chunks and
a batch of two are compared with the model's own forward. All this on a few tokens that cross every window: the method's
n_local and each layer's own sliding window are made short for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lminf_eval.errors import BUILDING, UsageError, first_line, out_of_memory, reason
from lminf_eval.methods.base import AttentionMethod, WindowedMethod
from lminf_eval.methods.full import Full
from lminf_eval.methods.registry import DEFAULT
from lminf_eval.models.attention_module import patched_by
from lminf_eval.models.families.registry import scales_queries, unsupported
from lminf_eval.models.families.table import adapter_of
from lminf_eval.models.full_model import FullModel
from lminf_eval.models.modules import (
    attention_layers,
    device_of,
    find_rotary,
    short_windows,
    takes,
)
from lminf_eval.models.patching import PatchedModel
from lminf_eval.models.quantisation import quantisation
from lminf_eval.models.rope import frozen_length
from lminf_eval.models.rotation_check import SHIFT, compare_layers, record, relative_error
from lminf_eval.models.runner import ModelRunner

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

# Relative error allowed of logits that another attention kernel computed. A wrong convention is off by tenths. A model
# in float64 may still compute its norms and softmax in float32.
_PRECISE = torch.float32, torch.float64
_LOGITS, _HALF_LOGITS, _HALF_SHIFT = 1e-3, 1e-1, 2.5e-1
_TOKENS = 40  # of the check: they cross a window twice
_PLAIN = 2**15  # of the vocabulary, from which they are drawn
_LOCAL, _OWN = 14, 8  # n_local during the check, and each layer's own window, at most
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # as configs call their number

Runner = PatchedModel | FullModel


def checked_runner(
    model: PreTrainedModel,
    method: AttentionMethod,
    make: Callable[..., PatchedModel] = PatchedModel,
    expected: torch.Tensor | None = None,
) -> Runner:
    """Return `model` as the engine runs it under `method`: see `patched_model`, or `full_model` without a window.

    Raises:
        UsageError: if what runs would not be the same model; `model` is then as it was.
    """
    if isinstance(method, WindowedMethod):
        return patched_model(model, method, make, expected)
    return full_model(model, expected)


def patched_model(
    model: PreTrainedModel,
    method: WindowedMethod,
    make: Callable[..., PatchedModel] = PatchedModel,
    expected: torch.Tensor | None = None,
) -> PatchedModel:
    """Patch `model` by `make(model, method)`, and check it.

    Args:
        expected: the model's `own_logits` from before, if each of several ranks now holds a part of it.

    Raises:
        UsageError: if the patched model would not be the same model; `model` is then as it was.
    """
    if patched_by(attention_layers(model)) is not None:
        raise UsageError("the model is patched already; restore it first (leave its `with lminf.patch(model):` block)")
    with _refusing(model.config, method.name):
        own = adapter_of(model.config.model_type) is not None
        expected = own_logits(model, method) if expected is None else expected.to(model.device)
        ids = _ids(model)
        with torch.inference_mode(), frozen_length(find_rotary(model), method.n_local):
            recorded = None if own else record(model, ids)
        patched = make(model, method)
        if recorded is not None:
            patched.follow([module for module, *_ in recorded])
        try:
            windows = {method.n_local} if recorded is None else compare_layers(patched, recorded, ids)
            _compare_logits(patched, expected, ids)
        except BaseException:
            patched.restore()
            raise
    if method.n_local not in windows:
        logger.warning(
            "%r: all layers slide as trained, over %s tokens, whatever n_local is: this is the model as it is",
            model.config.model_type,
            max(windows),
        )
    return patched


def full_model(model: PreTrainedModel, expected: torch.Tensor | None = None) -> FullModel:
    """Return `model` for `attention=full`, its chunks and batches checked against its own forward.

    `expected` are the model's `own_logits` from before, as for `patched_model`.

    Raises:
        UsageError: if chunks or batches would change what the model says; `model` is then as it was.
    """
    with _refusing(model.config, Full.name):
        expected = own_logits(model, None) if expected is None else expected.to(model.device)
        full = FullModel(model)
        try:
            with short_windows(model, _OWN):
                _compare_with_own(full, expected, _ids(model))
        except BaseException:
            full.restore()
            raise
    return full


@contextmanager
def _refusing(config: PretrainedConfig, attention: str) -> Iterator[None]:
    """Whatever goes wrong inside is the family's, unless it is memory."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UsageError) or out_of_memory(error):
            raise
        raise UsageError(unsupported(config, f"{type(error).__name__}: {first_line(error)}", attention)) from error


@torch.no_grad()  # not inference_mode: some weights are made by the first pass, and their user may train them
def own_logits(model: PreTrainedModel, method: AttentionMethod | None) -> torch.Tensor:
    """Return [T, V]: what the unpatched model's own forward says of the check's T tokens, its windows made short.

    Under a `method` with a window its frequencies are those of n_local, and the same tokens further on must give the
    same.

    Raises:
        UsageError: if the logits are not finite numbers, or depend on absolute positions.
    """
    ids = _ids(model)
    length, shifted = ids.shape[1], False
    if isinstance(method, WindowedMethod):
        length, shifted = method.n_local, _takes_positions(model)
    options = {}
    if shifted:  # in one pass, which reads the weights once
        at_L = torch.arange(ids.shape[1], device=ids.device)
        ids, options["position_ids"] = ids.expand(2, -1), torch.stack([at_L, at_L + SHIFT])
    with frozen_length(find_rotary(model), length), short_windows(model, _OWN):
        logits, *moved = _own_forward(model, input_ids=ids, **options)
    if not logits.isfinite().all():
        line = "the model's own logits are not finite numbers; check its weights and dtype"
        raise UsageError(f"{model.config.model_type!r}: {line}")
    if moved:
        why = "its logits depend on absolute positions: the same tokens further on differ by"
        # In half precision cosines are rounded by position too, and an expert may change with them.
        _require(model, moved[0], logits, why, None if _precise(model) else _HALF_SHIFT)
    return logits


def _own_forward(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Return [B, T, V], logits of the unpatched model.

    Raises:
        UsageError: if it fails, which no attention method can be blamed for.
    """
    try:
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    except BUILDING as error:
        if isinstance(error, UsageError) or out_of_memory(error):
            raise
        weights = f" with {quantised} weights" if (quantised := quantisation(model)) else ""
        line = f"the model's own forward pass{weights} in {str(model.dtype).removeprefix('torch.')} fails"
        raise UsageError(f"{model.config.model_type!r}: {line}: {reason(error)}") from error
    return logits


def _takes_positions(model: PreTrainedModel) -> bool:
    own = adapter_of(model.config.model_type) is not None
    return not own and not scales_queries(model.config) and takes(model, "position_ids") is not None


def _ids(model: PreTrainedModel) -> torch.Tensor:
    """[1, T]: plain tokens; a model for images and text sees a placeholder for an image otherwise."""
    text, generator = model.config.get_text_config(), torch.Generator().manual_seed(0)
    length = min(_TOKENS, getattr(text, "max_position_embeddings", None) or _TOKENS)
    named = [value for name, value in vars(model.config).items() if name.endswith(("_token_id", "_token_index"))]
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    plain = torch.tensor([token for token in range(min(text.vocab_size, _PLAIN)) if token not in special])
    ids = plain[torch.randint(len(plain), (1, length), generator=generator)]
    return ids.to(device_of(model.get_input_embeddings()))


def _compare_logits(patched: PatchedModel, expected: torch.Tensor, ids: torch.Tensor) -> None:
    """Chunks and single tokens against the model's own below n_local, and beyond it against one whole chunk."""
    model, method = patched.model, patched.method
    n = min(method.n_local, _LOCAL, ids.shape[1])
    patched.method = method.shrunk(n)
    try:
        with short_windows(model, _OWN):
            chunked = _chunked_logits(patched, ids, n)
            whole = _logits(patched, ids, set())
    finally:
        patched.method = method
    rough = patched.slopes is not None and patched.family is not None and patched.family.rounds_bias
    limit = _HALF_LOGITS if rough else None
    _require(model, chunked[:n], expected[:n], "its patched logits differ from its own below n_local by", limit)
    _require(model, chunked, whole, "its logits in chunks differ from those in one piece by")


def _compare_with_own(full: FullModel, expected: torch.Tensor, ids: torch.Tensor) -> None:
    """Chunks, single tokens, and batches of two against the model's own forward; finds out what the model takes."""
    T = ids.shape[1]
    try:
        _compare_chunks(full, expected, ids)
    except UsageError:
        if not full.gives_positions:
            raise
        full.gives_positions = False  # RoBERTa counts positions from two on, and does so only if none are given
        _compare_chunks(full, expected, ids)
    try:
        _compare_batch(full, expected, ids, (T // 3, T // 2))
    except UsageError:
        full.pads = False  # absolute positions, most often: a batch is then of one length
        _compare_batch(full, expected, ids, (T // 2, T // 2))


def _compare_chunks(full: FullModel, expected: torch.Tensor, ids: torch.Tensor) -> None:
    T, why = ids.shape[1], "its logits in chunks differ from those of its own forward by"
    _require(full.model, _logits(full, ids, {T // 3, 2 * T // 3, T - 2, T - 1}), expected, why, attention=Full.name)


def _compare_batch(full: FullModel, expected: torch.Tensor, ids: torch.Tensor, lengths: tuple[int, int]) -> None:
    caches = []
    for n in lengths:
        caches.append(full.new_cache(1, ids.shape[1]))
        full.hidden(ids[:, :n], caches[-1])
    batch = full.stack([cache.rows([0]) for cache in caches])
    output = full.hidden(torch.cat([ids[:, n : n + 1] for n in lengths]), batch)
    found = full.logits(output, output.last_hidden_state[:, -1])
    why = "its logits in a batch differ from those of its own forward by"
    _require(full.model, found, expected[list(lengths)], why, attention=Full.name)


def _logits(runner: ModelRunner[Any], ids: torch.Tensor, cuts: set[int]) -> torch.Tensor:
    """Return [T, V]: the tokens passed in chunks that end at `cuts`, so that the cache is part of the check."""
    ends = sorted({cut for cut in cuts if 0 < cut < ids.shape[1]} | {ids.shape[1]})
    cache, found = runner.new_cache(1, ids.shape[1]), []
    for start, end in zip([0, *ends], ends, strict=False):
        output = runner.hidden(ids[:, start:end], cache)
        found.append(runner.logits(output, output.last_hidden_state[0]))
    return torch.cat(found)


def _chunked_logits(patched: PatchedModel, ids: torch.Tensor, n: int) -> torch.Tensor:
    """Return [T, V]: the tokens in chunks, and those at n - 1 and T - 1 alone, in one pass of rows at two positions."""
    T = ids.shape[1]
    cache, found, alone = patched.new_cache(1, T), [], {}
    for start, end in pairwise(sorted({0, n // 2, n - 1, T - 1})):
        if start and start == n - 1:
            alone[start] = cache.rows([0])
        output = patched.hidden(ids[:, start:end], cache)
        found.append(patched.logits(output, output.last_hidden_state[0]))
    alone[T - 1] = cache
    at = list(alone)
    output = patched.hidden(ids[0, at, None], patched.stack(list(alone.values())))
    singles = patched.logits(output, output.last_hidden_state[:, -1])
    logits = torch.cat([*found, singles[-1:]])
    logits[at] = singles
    return logits


def _require(
    model: PreTrainedModel,
    found: torch.Tensor,
    expected: torch.Tensor,
    why: str,
    limit: float | None = None,
    attention: str = DEFAULT,
) -> None:
    """Refuse the model if logits lie further apart than rounding explains."""
    quantised = quantisation(model)
    limit = limit or (_LOGITS if _precise(model) and not quantised else _HALF_LOGITS)
    error = _logits_error(found, expected, model)
    if not error < limit:  # NaN must not pass
        note = f" ({quantised} weights may differ by {limit:.0%})" if quantised else ""
        raise UsageError(unsupported(model.config, f"{why} {100 * error:.2g}%{note}", attention))


def _precise(model: PreTrainedModel) -> bool:
    """Whether a model computes in float32 or float64; some make float32 logits of bfloat16 hidden states."""
    return model.dtype in _PRECISE


def _logits_error(found: torch.Tensor, expected: torch.Tensor, model: PreTrainedModel) -> float:
    """`relative_error`; of experts in half precision, the least that three tokens in four stay below.

    There another rounding may choose another expert for a token, whose logits are then other ones altogether.
    """
    text = model.config.get_text_config()
    parts = text, getattr(text, "ffn_config", None)  # DBRX's
    experts = any(getattr(part, name, None) not in (None, 0, 1) for part in parts for name in _EXPERTS)
    if not experts or _precise(model):
        return relative_error(found, expected)
    errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
    return float(torch.tensor(errors).quantile(0.75))  # NaN where any is
