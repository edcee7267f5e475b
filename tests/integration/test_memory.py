"""Peak memory does not grow with length: the whole adapter, in a process of its own, the shorter text first."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from pydoc_data.topics import topics
from lm_eval.api.instance import Instance
from lminf_eval.harness.lm import LMInfinite

folder, *lengths = sys.argv[1:]
for length in map(int, lengths):
    lm = LMInfinite(folder, device="cpu", dtype="float32", n_local=1024)
    text = lm.tok_decode(lm.tok_encode("\\n".join(topics[name] for name in sorted(topics)))[:length])
    (total,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    print(lm.answers.tokens["computed"], total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_eight_times_the_length_takes_the_same_memory(tiny_llama):
    folder = tiny_llama(hidden_size=64, vocab_size=16384)
    peaks, lengths = {}, (4096, 32768)
    command = [sys.executable, "-c", SCRIPT, str(folder), *map(str, lengths)]
    # Python is to look for garbage as often as it does by itself, not as tests/startup has it.
    environment = {name: value for name, value in os.environ.items() if name != "LMINF_TESTS_PARSED"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for length, line in zip(lengths, run.stdout.splitlines(), strict=True):
        computed, total, peaks[length] = map(float, line.split())
        assert computed == pytest.approx(length, rel=1e-3)
        assert total < -length  # a random model: more than a nat per token
    assert peaks[32768] - peaks[4096] < 150, peaks  # MiB; 28672 tokens' logits alone would be 1.9 GB
