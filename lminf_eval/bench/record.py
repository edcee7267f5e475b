"""One measurement: its raw values, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from lminf_eval.bench.roofline import Ceilings, Work
from lminf_eval.bench.timing import Told

Setting = Mapping[str, Any]  # what a measurement was made at, such as its length


@dataclass(frozen=True)
class Record:
    """What was measured in one setting of a case, in paired runs: values[side][i] belong together for each i.

    Attributes:
        unit: "s" or "B", of the values.
        tokens: what one value is divided by to be a token's.
        work: of one value, by formula.
        skipped: sides that were not measured, and why.
        rated: sides do unequal work; compare their time for an operation, not their time.
        facts: further numbers that belong to it.
    """

    case: str
    setting: Setting
    values: dict[str, list[float]]
    unit: str = "s"
    tokens: int = 1
    work: dict[str, Work] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    rated: bool = False
    facts: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """What tells it from the others."""
        return self.case, *sorted(self.setting.items())

    def cost(self, side: str, value: float) -> float:
        """What is compared: the value, or where work is unequal its time for an operation."""
        return value / self.work[side].flops if self.rated else value

    def ratios(self) -> dict[str, dict[str, float]]:
        """For each side but the first: how many times the first one's cost it has, by pairs of runs. None of a first
        one that cost nothing, as a peak of memory that hid below an earlier one does."""
        first, *others = self.values or [""]
        costs = {side: [self.cost(side, value) for value in values] for side, values in self.values.items()}
        if not all(costs.get(first, [])):
            return {}
        return {other: spread([b / a for a, b in zip(costs[first], costs[other], strict=True)]) for other in others}

    def reached(self, ceilings: Ceilings) -> dict[str, float]:
        """For each side whose work is known: its floor on this machine over its median time."""
        return {
            side: ceilings.floor(self.work[side]) / median(self.values[side])
            for side in self.values
            if side in self.work
        }

    def to_json(self, ceilings: Ceilings) -> dict[str, Any]:
        """Everything, with what is derived under `summary`."""
        summary: dict[str, Any] = {side: spread(values) for side, values in self.values.items()}
        return asdict(self) | {
            "summary": {
                "sides": summary,
                "ratios": self.ratios(),
                "floor_s": {side: ceilings.floor(work) for side, work in self.work.items()} if self.unit == "s" else {},
                "reached": self.reached(ceilings) if self.unit == "s" else {},
            }
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Record:
        """The record that `to_json` wrote."""
        own = {name: raw[name] for name in cls.__dataclass_fields__}
        return cls(**own | {"work": {side: Work(**work) for side, work in raw["work"].items()}})


@dataclass(frozen=True)
class Job:
    """A measurement to be made; `seconds` is a guess of its time, for the estimate alone.

    `run(setting, told)` makes it, telling its progress to `told`.
    """

    case: str
    setting: Setting
    seconds: float
    run: Callable[[Setting, Told], Record]

    @property
    def key(self) -> tuple:
        """That of the record it makes."""
        return self.case, *sorted(self.setting.items())


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": median(values), "low": min(values), "high": max(values)}
