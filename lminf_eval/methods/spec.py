"""What the method is asked to do: `LambdaSpec`, parsed from lm-eval's `--model_args`, validated, printed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lminf_eval.errors import UsageError

# The attentions that each setting is a part of; it changes nothing under the others.
GOES_WITH = {
    "n_local": ("lambda", "streaming", "window"),
    "n_global": ("lambda", "streaming"),
    "top_k": ("lambda",),
    "top_k_from_layer": ("lambda",),
    "top_k_distance": ("lambda",),
    "rope": ("full",),
    "rope_factor": ("full",),
}


class LambdaSpec(BaseModel):
    """The attention a model is run with (LM-Infinite, arXiv 2308.16137, section 4).

    A query at position i sees the key at j <= i by the *local branch* where i - j < n_local, at its true distance, and
    by the *global branch* where j < n_global and i - j >= n_local, at a distance held at n_local. One softmax.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: Literal["lambda", "full", "streaming", "window"] = Field(
        "lambda",
        description="lambda: the method; full: the model as it is; window: no starting tokens; streaming: StreamingLLM",
    )
    n_local: int | None = Field(
        None, ge=1, description="window in tokens; default: the length the model was pre-trained at"
    )
    n_global: int = Field(10, ge=0, description="starting tokens every token sees")
    top_k: int = Field(
        0, ge=0, description="middle keys seen again by each head from the last prompt token on; 0: none"
    )
    top_k_from_layer: int = Field(0, ge=0, description="first layer that sees middle keys again")
    top_k_distance: int | None = Field(
        None, ge=0, description="distance at which they are scored; default: half of n_local"
    )
    rope: Literal["linear", "dynamic", "yarn"] | None = Field(
        None, description="position scaling, with attention=full: a baseline"
    )
    rope_factor: float | None = Field(None, gt=1, description="how much further rope= is to reach")
    chunk_size: int = Field(2048, ge=1, description="tokens of one sequence that pass through the model at once")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any) -> Any:
        if isinstance(value, bool):  # Python takes True for 1
            raise ValueError("must be a number or a name, not True or False")
        return value

    @model_validator(mode="after")
    def _branches_fit(self) -> LambdaSpec:
        sinks_count = self.attention in GOES_WITH["n_global"]
        if sinks_count and self.n_local is not None and self.n_global >= self.n_local:
            raise ValueError(f"n_global={self.n_global} must be smaller than n_local={self.n_local}")
        for name in ("top_k", "rope"):  # off by default: whoever sets one expects it to be used
            value, allowed = getattr(self, name), GOES_WITH[name]
            if value and self.attention not in allowed:
                goes_with = f"{name}={value} goes with attention={' or '.join(allowed)}"
                raise ValueError(f"{goes_with}, not with attention={self.attention}")
        if (self.rope is None) != (self.rope_factor is None):
            raise ValueError("rope and rope_factor go together, as in rope=yarn,rope_factor=4")
        return self

    @classmethod
    def parse(cls, args: Mapping[str, Any]) -> LambdaSpec:
        """The spec that `args` (names and values of `--model_args`, only this class's) ask for.

        Raises:
            UsageError: for an impossible value, naming it and what is allowed.
        """
        try:
            return cls(**args)
        except ValidationError as error:
            raise UsageError("; ".join(_sentence(problem) for problem in error.errors())) from None

    @property
    def sinks(self) -> int:
        """Starting tokens that the global branch keeps: n_global, or none for `window`."""
        return 0 if self.attention == "window" else self.n_global

    def resolve(self, config: Any) -> tuple[LambdaSpec, str]:
        """This spec with n_local and top_k_distance filled in from a transformers `config`, and why n_local is that.

        Raises:
            UsageError: if the config tells no length, or one that n_global does not fit in.
        """
        n_local, why = (self.n_local, "set by n_local") if self.n_local is not None else trained_length(config)
        if n_local is None:
            raise UsageError(
                f"n_local: the config of {config.model_type!r} tells no pre-training length; pass n_local=<tokens>"
            )
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        if self.top_k and layers is not None and self.top_k_from_layer >= layers:
            raise UsageError(f"top_k_from_layer={self.top_k_from_layer} must be less than the model's {layers} layers")
        distance = n_local // 2 if self.top_k_distance is None else self.top_k_distance
        return LambdaSpec.parse({**self.model_dump(), "n_local": n_local, "top_k_distance": distance}), why


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


def closest(name: str, known: Iterable[str]) -> str:
    """A hint such as " (did you mean n_local?)", or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _sentence(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}={problem['input']}: {message[0].lower()}{message[1:]}" if name else message
