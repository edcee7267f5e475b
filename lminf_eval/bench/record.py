"""One measurement: its raw values, and what is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from lminf_eval.bench.roofline import HardwareLimits, Work
from lminf_eval.bench.timing import ProgressFn

Setting = Mapping[str, Any]  # what a measurement was made at, such as its length

_KEYS = {"compare_rates": "rated"}  # fields whose key in results files is another


@dataclass(frozen=True)
class Record:
    """What was measured in one setting of a case, in paired runs: for each i, the values[side][i] belong together.

    Attributes:
        unit: The unit of the values, "s" or "B".
        tokens: The number of tokens that one value covers.
        work: The work behind one value, by formula.
        skipped: The sides that were not measured, and why.
        compare_rates: The sides do unequal work; compare their time for an operation, not their time.
        facts: Further numbers about the measurement.
    """

    case: str
    setting: Setting
    values: dict[str, list[float]]
    unit: str = "s"
    tokens: int = 1
    work: dict[str, Work] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    compare_rates: bool = False
    facts: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """Return what identifies the measurement."""
        return self.case, *sorted(self.setting.items())

    def cost(self, side: str, value: float) -> float:
        """Return what is compared: the value, or if the sides do unequal work, its time for an operation."""
        return value / self.work[side].flops if self.compare_rates else value

    def ratios(self) -> dict[str, dict[str, float]]:
        """Return, for each side but the first, its cost over the first one's, by pairs of runs.

        Empty if the first side cost nothing, as a peak of memory does that stayed below an earlier one.
        """
        first, *others = self.values or [""]
        costs = {side: [self.cost(side, value) for value in values] for side, values in self.values.items()}
        if not all(costs.get(first, [])):
            return {}
        return {other: spread([b / a for a, b in zip(costs[first], costs[other], strict=True)]) for other in others}

    def efficiency(self, limits: HardwareLimits) -> dict[str, float]:
        """Return, for each side whose work is known, its roofline time on this hardware over its median time."""
        return {
            side: limits.roofline_seconds(self.work[side]) / median(self.values[side])
            for side in self.values
            if side in self.work
        }

    def to_json(self, limits: HardwareLimits) -> dict[str, Any]:
        """Return the record for the results file, with all derived numbers under `summary`.

        The keys "rated", "floor_s" and "reached" are those of the file's format.
        """
        timed = self.unit == "s"
        summary = {
            "sides": {side: spread(values) for side, values in self.values.items()},
            "ratios": self.ratios(),
            "floor_s": {side: limits.roofline_seconds(work) for side, work in self.work.items()} if timed else {},
            "reached": self.efficiency(limits) if timed else {},
        }
        own = {_KEYS.get(name, name): value for name, value in asdict(self).items()}
        return own | {"summary": summary}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Record:
        """Return the record that `to_json` wrote."""
        own = {name: raw[_KEYS.get(name, name)] for name in cls.__dataclass_fields__}
        return cls(**own | {"work": {side: Work(**work) for side, work in raw["work"].items()}})


@dataclass(frozen=True)
class Job:
    """A measurement to make. `seconds` is a rough guess of its time, used only for the printed estimate.

    `measure(setting, progress)` makes it and reports lines of progress.
    """

    case: str
    setting: Setting
    seconds: float
    measure: Callable[[Setting, ProgressFn], Record]

    @property
    def key(self) -> tuple:
        """Return the key of the record that it makes."""
        return self.case, *sorted(self.setting.items())


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest value."""
    return {"median": median(values), "low": min(values), "high": max(values)}
