"""Peak memory does not grow with length: the whole adapter, each length in a process of its own."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from pydoc_data.topics import topics
from lm_eval.api.instance import Instance
from lminf_eval.harness.lm import LMInfinite

folder, length = sys.argv[1], int(sys.argv[2])
lm = LMInfinite(folder, device="cpu", dtype="float32", n_local=1024)
text = lm.tok_decode(lm.tok_encode("\\n".join(topics[name] for name in sorted(topics)))[:length])
(total,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
print(lm.answers.tokens["computed"], total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_eight_times_the_length_takes_the_same_memory(tiny_llama):
    folder = tiny_llama(hidden_size=64, vocab_size=16384)
    peaks = {}
    for length in (4096, 32768):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder), str(length)], capture_output=True, text=True, check=True
        )
        computed, total, peaks[length] = map(float, run.stdout.split())
        assert computed == pytest.approx(length, rel=1e-3)
        assert total < -length  # a random model: more than a nat per token
    assert peaks[32768] - peaks[4096] < 150, peaks  # MiB; 28672 tokens' logits alone would be 1.9 GB
