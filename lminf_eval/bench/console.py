"""Print a bench as tables in a terminal."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lminf_eval.bench.options import CASES
from lminf_eval.bench.record import Record
from lminf_eval.bench.roofline import HardwareLimits
from lminf_eval.utils.formatting import format_measurement

LEGEND = (
    "median (lowest–highest) of interleaved runs · a / b: cost of a over cost of b, by pairs of runs; above 1 if b is "
    "better · %: the least time that this hardware needs for the counted operations or bytes, over the measured time"
)


def print_tables(console: Console, about: dict[str, Any], records: list[Record], limits: HardwareLimits) -> None:
    """Print a table for each case, and what was left out and why."""
    machine, model, versions = about["machine"], about["model"], about["versions"]
    where = f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores"
    console.print(Text(f"{model['name']}, {model['dtype']}, {model['device']}", style="bold"))
    console.print(Text(f"{where}; " + ", ".join(f"{name} {version}" for name, version in versions.items())))
    console.print(
        Text(
            f"hardware limits: {limits.peak_flops / 1e9:,.0f} GFLOP/s (matrix product), "
            f"{limits.bandwidth / 1e9:,.1f} GB/s (copy)"
        )
    )
    for line in _uncounted(model):
        console.print(Text(line))
    for case, meaning in CASES.items():
        if any(record.case == case for record in records):
            console.print()
            console.print(Text(f"{case}: {meaning}", style="bold"))
        groups: dict[tuple, list[Record]] = {}
        for record in records:
            if record.case == case:
                groups.setdefault((record.unit, tuple(record.setting), _part(record)), []).append(record)
        for group in groups.values():
            console.print(_table(group, limits))
        for line in _left_out([record for record in records if record.case == case]):
            console.print(Text(line))
    console.print()
    console.print(Text(LEGEND, style="dim"))


def _uncounted(model: dict[str, Any]) -> list[str]:
    """Return what is not counted of such a model's work, so that tables have no % for it."""
    if model["recurrent"]:
        where = f"{model['recurrent']} of {model['layers']} layers have a recurrent or convolutional state"
        return [f"{where}: what they compute is not counted, so only attention has a %"]
    if model["latent"]:
        return ["a cache may hold latents in place of keys and values, so decoding has no %"]
    return []


def _table(records: list[Record], limits: HardwareLimits) -> Table:
    table = Table(box=None, pad_edge=False)
    sides = list(dict.fromkeys(side for record in records for side in record.values))
    counted = any(record.work and record.unit == "s" for record in records)
    facts = list(dict.fromkeys(name for record in records for name in record.facts))
    for name in records[0].setting:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for i, side in enumerate(sides):
        table.add_column(Text(f"{side} ({_unit(records[0])})"), justify="right")
        if counted:
            table.add_column("%", justify="right")
        if i:
            table.add_column(Text(f"{side} / {sides[0]}"), justify="right", style="bold")
    if counted:
        table.add_column("operations, bytes of the first", justify="right")
    for name in facts:
        table.add_column(Text(name), justify="right")
    for record in records:
        efficiency = record.efficiency(limits) if counted else {}
        ratios = record.ratios()
        cells = [f"{value:,}" if isinstance(value, int) else str(value) for value in record.setting.values()]
        for i, side in enumerate(sides):
            cells.append(_values(record, side))
            if counted:
                cells.append(f"{efficiency[side]:.0%}" if side in efficiency else "")
            if i:
                cells.append(_ratio(ratios[side]) if side in ratios else "")
        if counted:
            first = next(iter(record.work.values()), None)
            cells.append(f"{first.flops:.3g}, {first.bytes:.3g}" if first else "")
        cells += [_fact(record.facts.get(name, "")) for name in facts]
        table.add_row(*map(Text, cells))
    return table


def _left_out(records: list[Record]) -> list[str]:
    """Return a line for each side and reason, with its settings unless it holds for all."""
    where: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for side, why in record.skipped.items():
            where.setdefault((side, why), []).append(_setting(record))
    return [
        f"left out: {side}{'' if len(settings) == len(records) else ' at ' + '; '.join(settings)}: {why}"
        for (side, why), settings in where.items()
    ]


def _part(record: Record) -> str:
    return str(record.setting.get("part", ""))


def _unit(record: Record) -> str:
    if record.unit == "B":
        return "MB"
    if record.compare_rates:
        return "GFLOP/s"
    return {"prefill": "tokens/s", "decode": "ms a token"}.get(record.case, "s")


def displayed_values(record: Record, side: str) -> list[float]:
    """Return the values of a side in the unit of its column (see `_unit`)."""
    values = record.values[side]
    if record.unit == "B":
        return [value / 1e6 for value in values]
    if record.compare_rates:
        return [record.work[side].flops / value / 1e9 for value in values]
    if record.case == "prefill":
        return [record.tokens / value for value in values]
    if record.case == "decode":
        return [1e3 * value / record.tokens for value in values]
    return values


def summarize(record: Record) -> str:
    """Return the medians of a record, in one line."""
    medians = [
        f"{side} {format_measurement(median(displayed_values(record, side)))} {_unit(record)}" for side in record.values
    ]
    return ", ".join([*medians, *(f"{side} left out" for side in record.skipped)])


def _values(record: Record, side: str) -> str:
    if side not in record.values:
        return ""
    values = displayed_values(record, side)
    middle = format_measurement(median(values))
    return (
        middle
        if len(values) == 1
        else f"{middle} ({format_measurement(min(values))}–{format_measurement(max(values))})"
    )


def _ratio(ratio: dict[str, float]) -> str:
    if ratio["low"] == ratio["high"]:
        return f"{ratio['median']:.2f}"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _setting(record: Record) -> str:
    return ", ".join(f"{name}={value}" for name, value in record.setting.items())


def _fact(value: float | str) -> str:
    return f"{value:,}" if isinstance(value, int) else format_measurement(value) if isinstance(value, float) else value
