"""The length that a model was pre-trained at, as its config tells it."""

from __future__ import annotations

from typing import Any


def trained_length(config: Any) -> tuple[int | None, str]:
    """The length in tokens that a model was pre-trained at, and the config key that says so.

    Under rope scaling that is `original_max_position_embeddings`; else the config's own maximum.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    per_type = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    original = [
        value["original_max_position_embeddings"] for value in per_type if value.get("original_max_position_embeddings")
    ]
    if original:
        return int(max(original)), "original_max_position_embeddings"
    for key in (
        "original_max_position_embeddings",
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
    ):
        if getattr(text, key, None):
            return int(getattr(text, key)), key
    return None, "none"
