"""A local text of hundreds of thousands of tokens through lm-eval's evaluator: memory that hardly grows.

Both lengths have a process to themselves, the shorter one first: what the longer one adds to the peak is its own.
"""

import json
import os
import subprocess
import sys
from pydoc_data.topics import topics

import pytest

SCRIPT = """
import json, resource, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lminf_eval.harness.plugin import task_folder

args = json.loads(sys.argv[1])
for length in args.pop("lengths"):
    manager = TaskManager(include_path=task_folder(), include_defaults=False, metadata=args | {"length": length})
    model_args = {"pretrained": args["pretrained"], "n_local": 256}
    results = simple_evaluate(
        "lminf", model_args=model_args, tasks=["pg19_ppl_2k"], task_manager=manager, device="cpu", bootstrap_iters=0
    )
    told = results["config"]["lminf"]["tokens_computed"], results["results"]["pg19_ppl_2k"]["nll,none"]
    print("told", length, *told, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    print("told", length, file=sys.stderr)
"""


def as_it_is() -> dict[str, str]:
    """Our environment, but that Python looks for garbage as often as it does by itself."""
    return {name: value for name, value in os.environ.items() if name != "LMINF_TESTS_PARSED"}


@pytest.mark.slow
def test_eight_times_the_length_takes_hardly_more_memory(tiny_llama, tmp_path):
    names = list(topics)
    turns = [names[i:] + names[:i] for i in range(0, len(names), len(names) // 4)]
    (tmp_path / "book.txt").write_text("\n".join(topics[name] for turn in turns for name in turn))
    args = {"pretrained": str(tiny_llama()), "data_files": str(tmp_path / "book.txt")}
    peaks = {}
    command = [sys.executable, "-c", SCRIPT, json.dumps(args | {"lengths": [50_000, 400_000]})]
    run = subprocess.run(command, env=as_it_is(), capture_output=True, text=True, check=True)
    for line in run.stdout.splitlines():
        if line.startswith("told "):
            length, computed, nll, peak = map(float, line.split()[1:])
            peaks[int(length)] = peak
            assert computed == pytest.approx(length, abs=16)
            assert nll > 1
    first, second, _ = run.stderr.split("told ")
    for said in (first, second):
        assert "tokens computed" in said or "tok/s" in said  # it says how far it is
    assert peaks[400_000] - peaks[50_000] < 100, peaks  # MiB; 16 nested prefixes hold 3.4 million tokens
