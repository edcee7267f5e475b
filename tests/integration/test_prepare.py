"""`lminf prepare`, then the run itself with the network cut: real commands behind a proxy that leads nowhere."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

CUT = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

LMINF = ("-c", "from lminf_eval.cli.app import app; app()")

pytestmark = pytest.mark.slow


def run(folder, *command, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in OFFLINE}
    environment |= {"DISABLE_MULTIPROC": "1", "HF_HOME": str(folder / "hf"), **CUT, **variables}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def test_prepared_and_then_run_without_a_network(tmp_path, tiny_llama):
    config = {
        "model": "lminf",
        "model_args": {"pretrained": str(tiny_llama()), "n_local": 48},
        "tasks": ["passkey_4k", "pg19_ppl_2k", "pydocs_ppl_2k"],
        "metadata": {"length": 512, "documents": 2, "buckets": 4, "data_files": "book.txt"},
        "device": "cpu",
        "output_path": "out",
    }
    (tmp_path / "book.txt").write_text("The sun is yellow, and the sky is blue. " * 100)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    prepared = run(tmp_path, *LMINF, "prepare", "run.yaml")
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    assert "does not answer" in prepared.stdout
    assert len(json.loads((tmp_path / "run.prepared.json").read_text())["resolved"]) == 4
    evaluated = run(tmp_path, "-m", "lm_eval", "run", "--config", "run.yaml", **OFFLINE)
    assert evaluated.returncode == 0, evaluated.stderr
    (results,) = tmp_path.glob("out/*/results_*.json")
    assert json.loads(results.read_text())["results"].keys() == set(config["tasks"])


def test_a_hub_that_does_not_answer_is_told_at_once(tmp_path):
    (tmp_path / "run.yaml").write_text("model_args: {pretrained: someone/absent}")
    began = time.monotonic()
    done = run(tmp_path, *LMINF, "prepare", "run.yaml")
    assert time.monotonic() - began < 60  # most of it imports; the hub's own client would go on trying
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert (
        "missing  model someone/absent: someone/absent is not in the hub's cache, nor a directory here" in done.stdout
    )
