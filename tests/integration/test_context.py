"""`parallel=context` through the real command: the answers of one process, with shards below and above n_local."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

N_LOCAL = 700  # of three shards those of the texts of 2048 tokens are shorter, those of the prompts of 4096 longer


@pytest.fixture(scope="module")
def evaluate(tiny_llama, tmp_path_factory):
    """`evaluate(ranks, **model_args)`: the results and, by task, the samples of one command."""
    folder = tiny_llama(max_position_embeddings=256)

    def run(ranks: int, **model_args):
        output = tmp_path_factory.mktemp("results")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        args = {"pretrained": folder, "dtype": "float32", "n_local": N_LOCAL, **model_args}
        command = [
            *(sys.executable, *launcher, "-m", "lm_eval", "run", "--model", "lminf", "--device", "cpu"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in args.items())),
            *("--tasks", "pydocs_ppl_2k,passkey_4k", "--metadata", '{"documents": 2, "depths": 2}'),
            *("--log_samples", "--output_path", str(output)),
        ]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (results,) = output.rglob("results_*.json")
        samples = {
            task: [json.loads(line) for line in next(output.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()]
            for task in ("pydocs_ppl_2k", "passkey_4k")
        }
        return json.loads(results.read_text()), samples

    return run


def test_answers_are_those_of_one_process(evaluate):
    """On three ranks, of which one has neighbours on both sides; tests/parallel/test_context.py has two and four."""
    results, samples = evaluate(3, parallel="context")
    expected, expected_samples = evaluate(1)
    said = results["config"]["lminf"]
    assert said["cp_size"] == 3
    for task, metrics in expected["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert results["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    for task in samples:
        assert [one["doc_id"] for one in samples[task]] == [one["doc_id"] for one in expected_samples[task]]
        assert len(samples[task]) > 1
    for ours, theirs in zip(samples["passkey_4k"], expected_samples["passkey_4k"], strict=True):
        assert ours["resps"] == theirs["resps"]
        assert len(ours["resps"][0][0]) > 5
    for ours, theirs in zip(samples["pydocs_ppl_2k"], expected_samples["pydocs_ppl_2k"], strict=True):
        totals = [[float(value) for (value,) in one["resps"]] for one in (ours, theirs)]
        assert totals[0] == pytest.approx(totals[1], rel=1e-4)
