"""Ratios, floors and JSON of a measurement, from numbers chosen by hand."""

import json

import pytest

from lminf_eval.bench.record import Record
from lminf_eval.bench.roofline import HardwareLimits, Work

MACHINE = HardwareLimits(peak_flops=1000.0, bandwidth=10.0)


@pytest.fixture
def record():
    return Record(
        "prefill",
        {"n_local": 64, "length": 128},
        {"lambda": [1.0, 2.0, 4.0], "hf": [4.0, 6.0, 8.0]},
        tokens=128,
        work={"lambda": Work(500.0, 1.0), "hf": Work(3000.0, 2.0)},
        skipped={"flash": "not installed"},
        facts={"chunk_size": 32},
    )


def test_ratios_are_of_runs_that_belong_together(record):
    assert record.ratios() == {"hf": {"median": 3.0, "low": 2.0, "high": 4.0}}


def test_unequal_work_is_compared_by_rate():
    values = {"band": [2.0], "sdpa": [1.0]}
    rated = Record("attention", {}, values, work={"band": Work(300.0), "sdpa": Work(100.0)}, compare_rates=True)
    assert rated.ratios()["sdpa"]["median"] == pytest.approx(1.5)  # 150 a second over 100 a second


def test_the_fraction_of_the_ceiling(record):
    assert record.efficiency(MACHINE) == {"lambda": 0.25, "hf": 0.5}


def test_json_holds_all_and_gives_it_back(record):
    raw = json.loads(json.dumps(record.to_json(MACHINE), allow_nan=False))
    assert Record.from_json(raw) == record
    assert raw["summary"] == {
        "sides": {
            "lambda": {"median": 2.0, "low": 1.0, "high": 4.0},
            "hf": {"median": 6.0, "low": 4.0, "high": 8.0},
        },
        "ratios": {"hf": {"median": 3.0, "low": 2.0, "high": 4.0}},
        "floor_s": {"lambda": 0.5, "hf": 3.0},
        "reached": {"lambda": 0.25, "hf": 0.5},
    }


def test_a_record_of_nothing_but_reasons():
    nothing = Record("prefill", {"length": 1}, {}, skipped={"lambda": "out of memory"})
    assert nothing.to_json(MACHINE)["summary"] == {"sides": {}, "ratios": {}, "floor_s": {}, "reached": {}}


def test_nothing_is_a_multiple_of_nothing():
    peaks = Record("memory", {}, {"lambda": [0.0], "hf": [5e6]}, "B")
    assert peaks.ratios() == {}
    assert peaks.to_json(MACHINE)["summary"]["sides"]["lambda"]["median"] == 0.0
