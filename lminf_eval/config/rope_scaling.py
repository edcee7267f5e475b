"""Position scaling, the other way to run a rotary model past its length: transformers' own rope types, set in a config.

`attention=full,rope=linear|dynamic|yarn,rope_factor=4` is one more row of a comparison. The model's code is untouched.
"""

from __future__ import annotations

from typing import Any

from lminf_eval.errors import UsageError
from lminf_eval.methods.spec import LambdaSpec, trained_length


def apply_rope(config: Any, spec: LambdaSpec) -> None:
    """Edit a transformers config, in place and before its model is made, as `rope` and `rope_factor` ask.

    Linear (position interpolation, arXiv 2306.15595) and YaRN (arXiv 2309.00071) are told the factor. Dynamic NTK takes
    its frequencies from the running length; `FullModel` holds them at the length of the whole sequence.

    Raises:
        UsageError: where the family has no rotary positions that could be scaled, or has them scaled already.
    """
    if spec.rope is None:
        return
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if not rope or getattr(text, "alibi", False):
        raise UsageError(f"rope={spec.rope}: the family {config.model_type!r} has no rotary positions to scale")
    nested = any(isinstance(value, dict) for value in rope.values())  # by layer type; sliding ones reach no further
    parts = [value for kind, value in rope.items() if isinstance(value, dict) and kind != "sliding_attention"]
    parts = [part for part in parts if part] if nested else [rope]
    length, _ = trained_length(config)
    for part in parts:
        if part.get("rope_type", "default") != "default":
            raise UsageError(f"rope={spec.rope}: the model's positions are scaled already, by {part['rope_type']!r}")
        part |= {"rope_type": spec.rope, "factor": spec.rope_factor}
        if spec.rope == "yarn":
            part["original_max_position_embeddings"] = length
    if spec.rope != "dynamic":  # which takes the trained length from there
        text.max_position_embeddings = int(length * spec.rope_factor)
