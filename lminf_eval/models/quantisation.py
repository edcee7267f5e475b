"""Quantised checkpoints: what transformers' own quantizers say of them, asked before a weight is read.

Only transformers knows which method needs which package or device. We ask it before anything expensive starts, so that
the answer is one line.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lminf_eval.errors import BUILDING, UsageError, reason


def quantisation_config(config: PretrainedConfig) -> Any:
    """Return the `quantization_config` of a model's config, where transformers looks for it; None if it has none."""
    return getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )


def method_name(quantised: Any) -> str:
    """Return the name of the method in a `quantization_config`, which may be a dict or transformers' object."""
    read = quantised.get if isinstance(quantised, dict) else lambda name: getattr(quantised, name, None)
    method = read("quant_method") or ("bitsandbytes" if read("load_in_4bit") or read("load_in_8bit") else "unknown")
    return str(getattr(method, "value", method))


def quantisation(model: PreTrainedModel) -> str:
    """Return the name of a model's quantisation, "" for none.

    A quantised model may round a chunk's activations by the chunk's own range, so that chunks change what it says.
    """
    if config := quantisation_config(model.config):
        return method_name(config)
    if any(".quantized." in type(module).__module__ for module in model.modules()):
        return "quantised"
    weights = (getattr(module, "weight", None) for module in model.modules() if isinstance(module, nn.Linear))
    kinds = {type(weight.data).__name__ for weight in weights if isinstance(weight, torch.Tensor)}
    return ", ".join(sorted(kinds - {"Tensor", "Parameter"}))


def quantizer_of(config: PretrainedConfig, device_map: Any = None) -> Any:
    """Return transformers' quantizer for a checkpoint, None for one that is not quantised.

    Args:
        device_map: where the weights will go, as `from_pretrained` takes it.

    Raises:
        UsageError: if transformers can't load the checkpoint on this machine, with what its own check says: the package
            or the kind of device that is missing.
    """
    quantised = quantisation_config(config)
    if not quantised:
        return None
    from transformers.quantizers.auto import AutoQuantizationConfig, get_hf_quantizer  # slow to import

    try:
        # As lm-eval's hf does. Without it transformers only warns of a method that it does not know.
        given = AutoQuantizationConfig.from_dict(copy.deepcopy(quantised)) if isinstance(quantised, dict) else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that the config's own is used, which is the same
            return get_hf_quantizer(copy.deepcopy(config), given, device_map, True, {})[0]
    except BUILDING as error:
        raise UsageError(
            f"quantization_config={method_name(quantised)}: transformers cannot load it here: "
            f"{reason(error).rstrip('.')}; or pass a checkpoint of this model that is not quantised"
        ) from error
