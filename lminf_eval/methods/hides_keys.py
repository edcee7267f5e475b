"""Methods that hide keys, and what brings them back: retrieval, layers that see everything, answers that do.

Source of retrieval: LM-Infinite, arXiv 2308.16137, section 4. There the last token of a prompt and each token after it
retrieve. Here all tokens of the question do: that decides whether anything is found (docs/methods.md has the
experiments). Source of the mixtures: SWAA, arXiv 2512.10411.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from lminf_eval.errors import UsageError
from lminf_eval.methods.base import LayerRule, WindowedMethod
from lminf_eval.methods.branches import UNBOUNDED, Branch, LaterKeys, OlderKeys, SlidingWindow

if TYPE_CHECKING:
    from typing_extensions import Self

ALL = "all"


class HidesKeys(WindowedMethod):
    """A windowed method that hides keys from a query, some of which the query may retrieve.

    Some layers may see all keys (`full_layers`), and so may the tokens of an answer (`full_decode`).

    A query that retrieves sees, in the same softmax as its method's branches, the `top_k` hidden keys with the largest
    logits, or whole blocks of keys. They are scored, chosen and seen with the query rotated to `top_k_distance` and the
    keys to 0.
    """

    n_local: int = Field(
        ge=1,
        description="tokens of the window, which are seen at their true distance",
        json_schema_extra={"default": "the length the model was pre-trained at, with `top_k` a quarter of it"},
    )
    top_k: int = Field(
        0, ge=0, description="hidden keys, or blocks of them, that a query retrieves; 5 is a good choice, 0 is none"
    )
    top_k_queries: int | str = Field(
        64,
        description="last tokens of a prompt that retrieve keys, as every token after it does; `all`: every token of a "
        "prompt or text; 1: the form of LM-Infinite's paper",
    )
    top_k_distance: int = Field(
        ge=0,
        description="distance at which a query sees the keys that it retrieves",
        json_schema_extra={"default": "`n_local`"},
    )
    top_k_from_layer: int = Field(
        ge=0,
        description="first layer that retrieves keys",
        json_schema_extra={"default": "a sixth of the layers"},
    )
    top_k_choice: Literal["head", "group", "layer"] = Field(
        "head",
        description="who chooses: each `head`, the heads of a key-value `group` together, or all heads of a `layer`",
    )
    top_k_block: int = Field(
        1, ge=1, description="tokens of a block; a block is chosen by its best token, and seen whole"
    )

    full_layers: str | list[int] | None = Field(
        None,
        description="layers in which every token sees all tokens before it: `odd`, `even`, `every:4` (the 4th, the "
        "8th, …), or numbers from 0 as in `1+3+5`",
    )
    full_decode: bool = Field(False, description="let the tokens of an answer see all tokens before them")

    @field_validator("top_k_queries", mode="before")
    @classmethod
    def _number_or_all(cls, value: Any) -> Any:
        if value != ALL and (type(value) is not int or value < 1):
            raise ValueError("must be a number of tokens, 1 or more, or all")
        return value

    @field_validator("full_layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        if value is None or (isinstance(value, str) and re.fullmatch(r"odd|even|every:[1-9]\d*", value)):
            return value
        numbers = value if isinstance(value, list | tuple) else str(value).split("+")
        if isinstance(value, bool) or not all(re.fullmatch(r"\d+", str(number)) for number in numbers):
            raise ValueError("must be odd, even, every:N, or layers as in 1+3+5")
        return sorted({int(number) for number in numbers})

    @model_validator(mode="after")
    def _mixture(self) -> Self:
        if self.full_decode and self.top_k:
            raise ValueError("full_decode=True goes with top_k=0: the tokens of an answer see all keys as it is")
        return self

    @classmethod
    def filled(cls, given: Mapping[str, Any], trained_length: int, layers: int) -> dict[str, Any]:
        """See `AttentionMethod`. If keys are retrieved, the window is a quarter of the trained length by default."""
        top_k = given.get("top_k", cls.model_fields["top_k"].default)
        found = super().filled(given, max(1, trained_length // 4) if top_k else trained_length, layers)
        if not top_k:  # the values that results and journals have contained since 0.1; they change no answer
            half = found["n_local"] // 2 if isinstance(found["n_local"], int) else 0  # another value is refused
            return {"top_k_distance": half, "top_k_from_layer": 0, **found}
        return {"top_k_distance": found["n_local"], "top_k_from_layer": layers // 6, **found}

    def check_layers(self, layers: int) -> None:
        """See `AttentionMethod`."""
        most = {"top_k_from_layer": self.top_k_from_layer if self.top_k else 0}
        if isinstance(self.full_layers, list):
            most["full_layers"] = max(self.full_layers, default=0)
        for name, layer in most.items():
            if layer >= layers:
                raise UsageError(f"{name}={layer}: must be less than {layers}, the model's number of layers")

    @property
    def retrieves(self) -> bool:
        """See `AttentionMethod`."""
        return self.top_k > 0

    @property
    def most_seen(self) -> int:
        """See `AttentionMethod`."""
        return self.attention_span + self.top_k * self.top_k_block

    @property
    def keeps_all(self) -> bool:
        """See `AttentionMethod`."""
        return self.full_decode or bool(self.full_layers)

    def rule(self, layer: int) -> LayerRule:
        """See `AttentionMethod`."""
        if self._sees_all(layer):
            return LayerRule(self._everything())
        if self.full_decode:
            return LayerRule((*self.branches(), Branch(LaterKeys())), self._everything())
        return LayerRule(self.branches(), retrieves=self.top_k > 0 and layer >= self.top_k_from_layer)

    def _everything(self) -> tuple[Branch, ...]:
        """Return branches that show all keys at their true distance; the window's rotations stay relative ones."""
        return Branch(SlidingWindow(self.n_local)), Branch(OlderKeys(self.n_local))

    def _sees_all(self, layer: int) -> bool:
        these = self.full_layers
        if isinstance(these, str):
            if these in ("odd", "even"):
                return layer % 2 == (these == "odd")
            return (layer + 1) % int(these.removeprefix("every:")) == 0
        return layer in (these or [])

    def answers_from(self, prompt: int) -> int:
        """See `AttentionMethod`; from there on, tokens retrieve keys, or see everything."""
        if self.top_k and self.top_k_queries == ALL:
            return 0
        if not prompt or not (self.top_k or self.full_decode):
            return UNBOUNDED
        return prompt if self.full_decode else max(0, prompt - int(self.top_k_queries))

    def shrunk(self, n_local: int) -> Self:
        """See `WindowedMethod`."""
        return self.model_copy(update={"n_local": n_local, "top_k": 0, "full_layers": None, "full_decode": False})

    def recorded(self) -> dict[str, Any]:
        """See `AttentionMethod`."""
        unused = [name for name in ("full_layers", "full_decode") if not getattr(self, name)]
        unused += () if self.top_k else ("top_k_queries", "top_k_choice", "top_k_block")
        return {name: value for name, value in self.model_dump().items() if name not in unused}
