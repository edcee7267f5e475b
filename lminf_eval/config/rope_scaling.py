"""Position scaling, the other way to run a rotary model past its length: transformers' own rope types, set in a config.

`attention=full,rope=linear|dynamic|yarn|ntk,rope_factor=4` is one more row of a comparison. The model's code is
untouched.
"""

from __future__ import annotations

from typing import Any

from lminf_eval.config.trained_length import trained_length
from lminf_eval.errors import UsageError


def apply_rope(config: Any, rope: str | None, factor: float | None) -> None:
    """Edit a transformers config, in place and before its model is made, so that positions are scaled.

    Linear (position interpolation, arXiv 2306.15595) and YaRN (arXiv 2309.00071) use the factor. Dynamic NTK takes its
    frequencies from the running length; `FullModel` holds them at the length of the whole sequence. NTK-aware scaling
    (arXiv 2309.00071, section 3.1) changes the base alone, to base * factor^(d / (d - 2)) for d rotated dimensions: the
    slowest frequency is then divided by the factor, and the fastest stays as it is.

    Args:
        rope: the name of the scaling; None for none.
        factor: how many times the trained length the positions should reach.

    Raises:
        UsageError: if the family has no rotary positions that could be scaled, or has them scaled already.
    """
    if rope is None or factor is None:
        return
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None)
    if not found or getattr(text, "alibi", False):
        raise UsageError(f"rope={rope}: the family {config.model_type!r} has no rotary positions to scale")
    nested = any(isinstance(value, dict) for value in found.values())  # by layer type; sliding ones reach no further
    parts = [value for kind, value in found.items() if isinstance(value, dict) and kind != "sliding_attention"]
    parts = [part for part in parts if part] if nested else [found]
    length, _ = trained_length(config)
    for part in parts:
        if part.get("rope_type", "default") != "default":
            raise UsageError(f"rope={rope}: the model's positions are scaled already, by {part['rope_type']!r}")
        if rope == "ntk":
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            d = int(head_dim * part.get("partial_rotary_factor", 1.0))
            part["rope_theta"] *= factor ** (d / (d - 2))
            continue
        part |= {"rope_type": rope, "factor": factor}
        if rope == "yarn":
            part["original_max_position_embeddings"] = length
    if rope != "dynamic":  # which takes the trained length from there
        assert length is not None  # a model with rotary positions says its length
        text.max_position_embeddings = int(length * factor)
