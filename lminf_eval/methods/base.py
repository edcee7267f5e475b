"""What every attention method says of itself: name, paper, parameters, branches, and what follows from these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from lminf_eval.methods.branches import UNBOUNDED, Branch, Chunks, FirstKeys, OlderKeys, SlidingWindow

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class LayerRule:
    """What the queries of one layer see.

    Attributes:
        branches: of every query, or of those that are no answer.
        answer: branches of the queries of an answer (tokens after the prompt), if they see something else.
        retrieves: whether queries retrieve hidden keys.
    """

    branches: tuple[Branch, ...]
    answer: tuple[Branch, ...] | None = None
    retrieves: bool = False

    def kept(self, tokens: int) -> int:
        """Return the number of keys that the layer keeps of a sequence of `tokens`, hidden ones aside."""
        return sum(branch.keys.kept(tokens) for branch in self.branches)


class AttentionMethod(BaseModel):
    """A method with all its parameters set. Subclasses add parameters as fields, and say their branches.

    Attributes:
        name: what `attention=` calls it.
        title: what its paper calls it.
        paper: where it is defined; "" for the model as it is.
        summary: one line for tables of methods.
        patched: whether it replaces the model's own attention.
        color, marker, line: how figures draw it, in matplotlib's terms.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    patched: ClassVar[bool] = True
    color: ClassVar[str] = ""
    marker: ClassVar[str] = ""
    line: ClassVar[str] = ""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        truth = cls.model_fields[info.field_name or ""].annotation is bool
        if isinstance(value, bool) and not truth:  # Python takes True for 1
            raise ValueError("must be a number or a name, not True or False")
        if truth and not isinstance(value, bool):
            raise ValueError("must be True or False")
        return value

    @classmethod
    def filled(cls, given: Mapping[str, Any], trained_length: int, layers: int) -> dict[str, Any]:
        """Return `given` with values for the parameters that a user may leave open.

        Args:
            trained_length: the length in tokens that the model was pre-trained at.
            layers: the number of the model's layers; 0 if nobody knows it.
        """
        return dict(given)

    def recorded(self) -> dict[str, Any]:
        """Return the parameters that tell this method's answers from others', for results and journals."""
        return self.model_dump()

    def check_layers(self, layers: int) -> None:
        """Refuse parameters that a model of so many layers cannot have.

        Raises:
            UsageError: naming the parameter.
        """

    def branches(self) -> tuple[Branch, ...]:
        """Return the method's branches; a key belongs to one of them at most for each query."""
        raise NotImplementedError

    def rule(self, layer: int) -> LayerRule:
        """Return what the queries of a layer see; layers count from 0."""
        return LayerRule(self.branches())

    def answers_from(self, prompt: int) -> int:
        """Return the first position that sees more than the method's branches do.

        Args:
            prompt: the tokens of the prompt; 0 for a text without one, which is scored whole.
        """
        return UNBOUNDED

    @property
    def keeps_all(self) -> bool:
        """Whether it needs every key of a sequence, so that memory grows with length."""
        return kept_whole(self.branches()) is not None

    @property
    def needs_old_keys(self) -> bool:
        """Whether some query may see any key of a sequence."""
        return self.keeps_all or self.retrieves

    @property
    def attention_span(self) -> int:
        """The most keys that a query sees, retrieved ones aside."""
        return UNBOUNDED if self.keeps_all else self.kept(UNBOUNDED)

    @property
    def most_seen(self) -> int:
        """The most keys that a query sees, retrieved ones included."""
        return self.attention_span

    @property
    def retrieves(self) -> bool:
        """Whether queries retrieve keys that its branches hide."""
        return False

    def kept(self, tokens: int) -> int:
        """Return the number of keys that the branches keep of a sequence of `tokens`; see `rule` for each layer."""
        return LayerRule(self.branches()).kept(tokens)

    def seen(self, position: int) -> int:
        """Return the number of keys that the query at `position` sees, its own included."""
        return sum(branch.keys.seen(position) for branch in self.branches())

    def pairs(self, tokens: int) -> int:
        """Return the number of (query, key) pairs in a sequence of `tokens`."""
        return sum(branch.keys.pairs(tokens) for branch in self.branches())


class WindowedMethod(AttentionMethod):
    """A method with a window of `n_local` tokens, in which it is the model as it was trained."""

    n_local: int = Field(
        ge=1,
        description="tokens of the window, which are seen at their true distance",
        json_schema_extra={"default": "the length the model was pre-trained at"},
    )

    @classmethod
    def filled(cls, given: Mapping[str, Any], trained_length: int, layers: int) -> dict[str, Any]:
        """See `AttentionMethod`."""
        return {"n_local": trained_length, **given}

    def shrunk(self, n_local: int) -> Self:
        """Return the method with a window of `n_local` tokens and no retrieval: a few tokens then cross the window."""
        return self.model_copy(update={"n_local": n_local})


def window_of(branches: tuple[Branch, ...]) -> int:
    """Return the size of the sliding window among branches; 0 if there is none."""
    return next((branch.keys.size for branch in branches if isinstance(branch.keys, SlidingWindow)), 0)


def first_keys(branches: tuple[Branch, ...]) -> Branch[FirstKeys] | None:
    """Return the branch of the first keys, if there is one."""
    return next((b for b in branches if isinstance(b.keys, FirstKeys) and b.keys.count), None)


def older_keys(branches: tuple[Branch, ...]) -> Branch[OlderKeys] | None:
    """Return the branch of all older keys, if there is one."""
    return next((branch for branch in branches if isinstance(branch.keys, OlderKeys)), None)


def chunks(branches: tuple[Branch, ...]) -> tuple[Branch[Chunks], ...]:
    """Return the branches of chunks; they replace the sliding window."""
    return tuple(branch for branch in branches if isinstance(branch.keys, Chunks))


def kept_whole(branches: tuple[Branch, ...]) -> Branch | None:
    """Return a branch that needs all keys of a sequence, which are kept at its key positions, if there is one."""
    return older_keys(branches) or next(iter(chunks(branches)), None)
