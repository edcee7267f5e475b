"""PEFT adapters: those inside a model's layers run as they are; those outside it are refused, since nothing runs them.

A `PeftModel` wraps the model. What it adds by itself, before or around the model's own forward (virtual tokens, most
often), is no part of the layers that we drive.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from lminf_eval.errors import UsageError, first_line

_TOKENS, _ALLOWED = 16, 1e-3  # of the comparison of both forwards: tokens, and relative error


def check_adapter(peft: str, revision: str | None) -> None:
    """Refuse an adapter that lies outside the model's layers, from its config alone.

    Raises:
        UsageError: naming the adapter's type, or why its config can't be read.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(peft, revision=revision)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UsageError(f"peft={peft}: its adapter_config.json can't be read: {first_line(error)}") from error
    if config.is_prompt_learning:
        raise UsageError(_outside(peft, config))


@torch.no_grad()
def base_of(model: Any, peft: str | None) -> PreTrainedModel:
    """Return the transformers model inside a `PeftModel`, its adapter in its layers; any other model as it is.

    Raises:
        UsageError: if the two say something else, so that the adapter would be lost.
    """
    if not hasattr(model, "get_base_model"):
        return model
    base = model.get_base_model()
    ids = torch.arange(3, 3 + _TOKENS, device=model.device)[None] % base.config.get_text_config().vocab_size
    whole, inside = (one(input_ids=ids).logits.double() for one in (model, base))
    if whole.shape != inside.shape or not (whole - inside).norm() <= _ALLOWED * inside.norm():
        raise UsageError(_outside(peft, model.active_peft_config))
    return base


def _outside(peft: str | None, config: Any) -> str:
    kind = getattr(config.peft_type, "value", config.peft_type)
    return f"peft={peft}: an adapter of the type {kind} acts outside the model's layers; --model hf runs it"
