"""Seconds to score one text in the processes that a launcher started, or in this one: with a thread each.

`torchrun --nproc_per_node 2 -m lminf_eval.bench.workers.context_parallel '{…}'`
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import replace

import torch
from transformers.utils.logging import disable_progress_bar

from lminf_eval.bench.benchmark_model import BenchmarkModel, score_requests
from lminf_eval.bench.options import Options
from lminf_eval.harness.lm import LMInfinite

WARM = 1024  # tokens of the request before; long enough to be spread


def main(task: dict) -> float:
    """Measure the seconds of one rolling request of `length` tokens after a short one. Only rank 0 returns."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bar()
    torch.set_num_threads(1)
    options = Options(**task["options"])
    if options.device.startswith("cuda"):
        options = replace(options, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    bench_model = BenchmarkModel(options)
    n_local, model_args = task["n_local"], bench_model.options.model_args
    lm = LMInfinite(
        bench_model.model, tokenizer=bench_model.tokenizer, n_local=n_local, parallel="context", **model_args
    )
    score_requests(lm, bench_model.rolling(min(WARM, task["length"])))
    requests = bench_model.rolling(task["length"])
    begun = time.perf_counter()
    score_requests(lm, requests)  # the answer is a number on the host: the device is done
    return time.perf_counter() - begun


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1])))
