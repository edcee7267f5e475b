"""The order of runs, what is counted, and a side that runs out of memory."""

import time

import pytest
import torch

from lminf_eval.bench.timing import Stopwatch, interleave


@pytest.mark.parametrize(("warm", "order"), [(True, "ababab"), (False, "abab")])
def test_sides_run_in_turn(warm, order):
    ran, told = [], []
    sides = {name: (lambda name=name: ran.append(name)) for name in "ab"}
    seconds, skipped = interleave(sides, 2, "cpu", told.append, warm)
    assert "".join(ran) == order
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert not skipped
    assert told[-1] == "b, run 2 of 2"


def test_a_side_out_of_memory_is_left_out_and_the_other_goes_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    seconds, skipped = interleave({"a": fail, "b": lambda: None}, 2, "cpu", lambda line: None)
    assert list(seconds) == ["b"]
    assert len(seconds["b"]) == 2
    assert skipped == {"a": "out of memory: CUDA out of memory. Tried to allocate 9 GiB"}


def test_a_stopwatch_adds_up_calls_and_hands_on_what_they_give():
    watch = Stopwatch(lambda x, y=1: time.sleep(0.02) or x + y, "cpu")
    assert watch(1, y=2) == 3
    once = watch.seconds
    assert watch(5) == 6
    assert 0.02 <= once < watch.seconds
