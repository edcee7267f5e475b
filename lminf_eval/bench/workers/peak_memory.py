"""The peak of memory while one text is scored, in this process alone.

`python -m lminf_eval.bench.workers.peak_memory '{…}'`
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from pathlib import Path

import torch

from lminf_eval.bench.benchmark_model import BenchmarkModel, score_requests
from lminf_eval.bench.options import Options

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WARM = 64  # tokens of the request before


def main(task: dict) -> int:
    """Measure the peak bytes of scoring `length` tokens, without those used before, for weights and libraries."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task["options"] |= {"lengths": [max(task["length"], WARM)]}
    options = Options(**task["options"])
    if options.threads:
        torch.set_num_threads(options.threads)
    bench_model = BenchmarkModel(options)
    lm = bench_model.hf if task["side"] == "hf" else bench_model.lambda_lm(task["n_local"])
    for parameter in bench_model.model.parameters():  # a file's pages are read when they are looked at
        parameter.sum()
    score_requests(lm, bench_model.rolling(WARM))
    cuda = bench_model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench_model.device)
        before = torch.cuda.memory_allocated(bench_model.device)
    else:
        _forget_peak()
        before = _resident("VmRSS")
    score_requests(lm, bench_model.rolling(task["length"]))
    after = torch.cuda.max_memory_allocated(bench_model.device) if cuda else _resident("VmHWM")
    return max(0, after - before)


def _forget_peak() -> None:
    """Reset Linux's peak counter, or the peak of loading would hide ours."""
    if CLEAR.exists():
        CLEAR.write_text("5")


def _resident(field: str) -> int:
    """Return the bytes of this process's memory, now (VmRSS) or at most (VmHWM); without /proc the latter for both."""
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(fields[field].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1])))
