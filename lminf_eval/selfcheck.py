"""The check at load that makes every unknown family safe: a patched model must be the model, where Λ changes nothing.

Two tiny passes compare, layer by layer, the queries and keys that the model rotates itself with those that we rotate
for it; so a layer without positions is found, and a family whose keys exist only rotated is refused. A third compares
logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lminf_eval.attention.kernels import attend
from lminf_eval.errors import UsageError
from lminf_eval.families import FAMILIES
from lminf_eval.patch import (
    IMPLEMENTATION,
    LambdaModel,
    attention_layers,
    device_of,
    find_rotary,
    head_logits,
    rotary_module,
)
from lminf_eval.rope import held
from lminf_eval.spec import LambdaSpec
from lminf_eval.support import unsupported

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

# Relative error allowed: of a rotation done by the same function on the same numbers, and of whole-model logits that
# another attention kernel computed. A wrong convention is off by tenths.
_ROTATION = {torch.float64: 1e-5, torch.float32: 1e-4}
_LOGITS = {torch.float64: 1e-4, torch.float32: 1e-3}
_HALF_ROTATION, _HALF_LOGITS = 2e-2, 1e-1
_TOKENS = 24
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # as configs call their number


def lambda_model(
    model: PreTrainedModel,
    spec: LambdaSpec,
    make: Callable[..., LambdaModel] = LambdaModel,
    expected: torch.Tensor | None = None,
) -> LambdaModel:
    """`model` patched to Λ-attention by `make(model, spec)`, and checked.

    `expected` are its `own_logits` from before, where it can no longer tell them: each of several ranks holds a part.

    Raises:
        UsageError: where the patched model would not be the same model; `model` is then as it was.
    """
    if any(hasattr(layer, "lminf") for layer in attention_layers(model)):
        raise UsageError("the model is a Λ model already; `restore()` that one first")
    own = model.config.model_type in FAMILIES
    rotary = next(iter(find_rotary(model)), None) if own else rotary_module(model)
    ids = _ids(model)
    expected = own_logits(model, spec) if expected is None else expected.to(model.device)
    with torch.inference_mode(), held(rotary, spec.n_local):
        recorded = None if own else _record(model, ids)
    if not expected.isfinite().all():
        raise UsageError(
            f"{model.config.model_type!r}: the model's own logits are not finite numbers; check its weights"
        )
    patched = make(model, spec)
    try:
        if not own:
            _compare_layers(patched, recorded, ids)
        windows = _compare_logits(patched, expected, ids[:, : len(expected)])
    except BaseException:
        patched.restore()
        raise
    if spec.n_local not in windows:
        logger.warning(
            "%r: all layers slide as trained, over %s tokens, whatever n_local is: this is the model as it is",
            model.config.model_type,
            max(windows),
        )
    return patched


@torch.inference_mode()
def own_logits(model: PreTrainedModel, spec: LambdaSpec) -> torch.Tensor:
    """[n, V]: what the unpatched model says of the check's tokens, few enough that no window ends among them."""
    window = getattr(model.config.get_text_config(), "sliding_window", None) or _TOKENS
    visible = _ids(model)[:, : min(spec.n_local or _TOKENS, window)]
    with held(next(iter(find_rotary(model)), None), spec.n_local or _TOKENS):  # the frequencies that Λ will use
        output = model.base_model(input_ids=visible, use_cache=False, return_dict=True)
        return head_logits(model, model.base_model, output, output.last_hidden_state[0])


def _ids(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, (1, _TOKENS), generator=generator).to(
        device_of(model.get_input_embeddings())
    )


class _Recorder:
    """Stands in for a LambdaModel: keeps each layer's rotated queries and keys, and what it answered."""

    def __init__(self):
        self.layers = {}

    def attend(self, module: nn.Module, q, k, v, scale, options):
        out, _ = attend(q, k, v, scale, causal=True)
        self.layers[module.layer_idx] = q, k, out
        return out


def _record(model: PreTrainedModel, ids: torch.Tensor) -> dict:
    implementation, recorder = model.config._attn_implementation, _Recorder()
    layers = attention_layers(model)
    for layer in layers:
        layer.lminf = recorder
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        model.set_attn_implementation(implementation)
        for layer in layers:
            del layer.lminf
    return recorder.layers


def _compare_layers(patched: LambdaModel, recorded: dict, ids: torch.Tensor) -> None:
    """Find which layers rotate, and refuse the family if some layer does neither what we do nor nothing."""
    positions = torch.arange(ids.shape[1])[None]
    seen = set()

    def attend_and_compare(module, q, k, v, scale, options):
        expected_q, expected_k, out = recorded[module.layer_idx]
        limit = _ROTATION.get(q.dtype, _HALF_ROTATION)
        seen.add(module.layer_idx)
        for rotated in (patched.rotated[module.layer_idx], False):
            patched.rotated[module.layer_idx] = rotated
            found = [patched._turn(module, x, positions, "near") for x in (q, k)]
            if max(relative_error(found[0], expected_q), relative_error(found[1], expected_k)) < limit:
                return out
        raise UsageError(
            unsupported(patched.model.config, f"layer {module.layer_idx} changes queries or keys after rotating them")
        )

    patched.attend = attend_and_compare
    try:
        with torch.inference_mode():
            patched.decoder(input_ids=ids, use_cache=False)
    finally:
        del patched.attend
        patched._shared = {}
    if seen != {layer.layer_idx for layer in patched.layers}:
        raise UsageError(
            unsupported(patched.model.config, "some of its attention layers can't be reached from outside")
        )


def _compare_logits(patched: LambdaModel, expected: torch.Tensor, ids: torch.Tensor) -> set[int]:
    """In two chunks and one last token, so that the cache and the decoder are part of the check.

    Returns:
        The windows that the model's layers have.
    """
    n = ids.shape[1]
    cache, found = patched.new_cache(1, n), []
    for part in (ids[:, : n // 2], ids[:, n // 2 : n - 1], ids[:, n - 1 :]):
        if part.shape[1]:
            output = patched.hidden(part, cache)
            found.append(patched.logits(output, output.last_hidden_state[0]))
    error = _logits_error(torch.cat(found), expected, patched.model.config.get_text_config())
    rough = patched.slopes is not None and patched.family.rounds_bias
    if not error < (_HALF_LOGITS if rough else allowed(expected.dtype)):  # NaN must not pass
        raise UsageError(
            unsupported(patched.model.config, f"its patched logits differ from its own by {error:.1%} below n_local")
        )
    return {layer.window for layer in cache.layers.values()}


def _logits_error(found: torch.Tensor, expected: torch.Tensor, text: PretrainedConfig) -> float:
    """`relative_error`; of experts in half precision, the least that three tokens in four stay below.

    There another rounding may choose another expert for a token, whose logits are then other ones altogether.
    """
    experts = any(getattr(text, name, None) not in (None, 0, 1) for name in _EXPERTS)
    if not experts or expected.dtype in _LOGITS:
        return relative_error(found, expected)
    errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
    return float(torch.tensor(errors).quantile(0.75))  # NaN where any is


def allowed(dtype: torch.dtype) -> float:
    """How far logits of the same model in `dtype` may lie apart, as `relative_error`."""
    return _LOGITS.get(dtype, _HALF_LOGITS)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """In the Frobenius norm; NaN where either has one."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
