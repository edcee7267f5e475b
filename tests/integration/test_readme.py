"""Every command of the README, run as it stands there; and its tables, held to the code."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from pydantic import Field
from transformers import AutoModelForCausalLM

import lminf_eval as lminf
from lminf_eval.harness.model_args import arguments_table
from lminf_eval.methods.base import WindowedMethod
from lminf_eval.methods.branches import Branch, OlderKeys, SlidingWindow
from lminf_eval.methods.registry import make
from lminf_eval.models.families.table import FAMILIES

CHECKOUT = Path(__file__).parents[2]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in FENCED if language == "sh" for line in block.splitlines()]
PAGES = [README, (CHECKOUT / "docs" / "python-api.md").read_text(encoding="utf-8")]
PYTHON = [block for page in PAGES for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)]

MODEL = "MODEL=$(lminf demo --print-model)"  # tests/test_demo.py has it; a tiny model stands in here
MAKE = [command for command in COMMANDS if command.startswith("make ")]
PIP = [command for command in COMMANDS if command.startswith("pip install ")]
RUN = [command for command in COMMANDS if re.match(r"([A-Z_]+=\d )?(lm_eval|lminf) ", command)]


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without their backquotes."""
    section = README.partition(f"{heading}\n")[2]
    table = re.search(r"(?:^\|.*\|\n)+", section, re.MULTILINE)[0]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def bash(command: str, folder: Path, **variables: str) -> str:
    """Standard output of a command, with the scripts of this Python first."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_no_command_is_left_out():
    assert {language for language, _ in FENCED} == {"sh", "python"}
    assert sorted(COMMANDS) == sorted([*MAKE, *PIP, MODEL, *RUN])
    assert all((MAKE, PIP, RUN))


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_runs_as_it_stands(block, tiny_llama, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(max_position_embeddings=4096))
    ids = torch.arange(3, 43)[None]
    text = "The sky is blue. " * 9
    names = {"lm_eval": lm_eval, "lminf": lminf, "model": model, "tokenizer": tiny_tokenizer, "ids": ids, "text": text}
    exec(block, names)
    if "results" in names:
        assert names["results"]["results"]["passkey_4k"]["acc,none"] == 0
    if "scores" in names:
        assert names["scores"].perplexity > 1
    assert not any(hasattr(module, "lminf") for module in model.modules())


def test_the_method_of_the_page_is_the_one_that_runs():
    page = (CHECKOUT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    names = {one.__name__: one for one in (WindowedMethod, Branch, OlderKeys, SlidingWindow)} | {"Field": Field}
    exec(re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1], names)
    i, j = torch.arange(100)[:, None], torch.arange(100)[None]
    for step in ({}, {"rerope_step": 3}):
        ours, shown = make("rerope", n_local=16, **step), names["ReRoPE"](n_local=16, **step)
        for one, other in zip(ours.branches(), shown.branches(), strict=True):
            assert one.keys == other.keys
            assert torch.equal(one.distance(i, j), other.distance(i, j))
        about = [
            (one.name, one.title, one.paper, one.summary, one.color, one.marker, one.line) for one in (ours, shown)
        ]
        assert about[0] == about[1]


def test_the_example_runs(tiny_llama, capsys):
    spec = importlib.util.spec_from_file_location("python_api", CHECKOUT / "examples" / "python_api.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(tiny_llama(max_position_embeddings=4096)), n_local=64, tokens=300)
    out = capsys.readouterr().out
    assert "after 300 tokens:" in out
    assert re.search(r"^keys and values held: 0\.\d MB$", out, re.MULTILINE)
    assert re.search(r"^lambda: perplexity \d+\.\d+ over 299 tokens$", out, re.MULTILINE)
    assert "rerope: ReRoPE" in out


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_its_targets(command):
    steps = bash(f"{command} --dry-run --always-make", CHECKOUT)
    assert "-m venv .venv" in steps
    assert {"make demo": ".venv/bin/lminf demo", "make test": ".venv/bin/python -m pytest"}[command] in steps


@pytest.mark.slow
@pytest.mark.parametrize("command", PIP)
def test_pip_would_install(command):
    pip = f"{sys.executable} -m {command} --dry-run --no-deps --no-index --no-build-isolation --force-reinstall"
    assert "Would install lminf-eval" in bash(pip, CHECKOUT)


def test_the_extras_are_there():
    project = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"\[(\w+)\]", " ".join(PIP)):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path, tiny_llama):
    model = str(tiny_llama(max_position_embeddings=8192))
    (tmp_path / "configs").symlink_to(CHECKOUT / "configs")
    printed = {command: bash(command, tmp_path, MODEL=model) for command in RUN}
    evaluated = [json.loads(file.read_text())["results"] for file in sorted(tmp_path.glob("results/*/results_*.json"))]
    assert [list(results) for results in evaluated] == [["passkey_32k"], ["passkey_32k"], ["pydocs_ppl_16k"]]
    assert evaluated[2]["pydocs_ppl_16k"]["nll_tail,none"] > 0
    table = next(out for command, out in printed.items() if command.startswith("lminf table"))
    assert "full" in table
    assert "lambda" in table
    assert "<html" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "results" / "bench.json").read_text())["finished"]
    doctor = next(out for command, out in printed.items() if "doctor --pretrained" in command)
    assert "memory for 65,536 tokens" in doctor
    plan = next(out for command, out in printed.items() if "sweep plan" in command)
    assert "openwebtext2_ppl_32k" in plan
    assert (tmp_path / "diagnosis" / "diagnosis.png").exists()
    tasks = next(out for command, out in printed.items() if command.startswith("LMINF_EVAL_AUTOLOAD=0"))
    assert "lambada_openai" in tasks
    assert "pydocs_ppl" not in tasks


def test_the_model_arguments_are_those_of_the_adapter():
    table = README.partition("### Model arguments")[2]
    for name, default, meaning in arguments_table():
        assert f"| `{name}` | {default} | {meaning} |" in table


def test_the_families_are_those_that_tests_hold_to_the_definition():
    told = {family for _, families in rows("### Families") for family in families.split(", ")}
    assert told == {name for name, row in FAMILIES.items() if row.tested}


def test_the_tasks_are_those_of_the_folder():
    for pattern, lengths, _ in rows("### Tasks"):
        group = pattern.removesuffix("_*")
        first, last = lengths.split(" … ")
        files = {path.stem for path in CHECKOUT.glob(f"tasks/*/{group}_*.yaml")}
        assert {f"{group}_{first}", f"{group}_{last}"} <= files
    groups = {path.stem for path in CHECKOUT.glob("tasks/*/[!_]*.yaml")}
    groups = {name.removesuffix("_lengths") for name in groups if not re.search(r"_\d+[km]$", name)}
    assert groups == {pattern.removesuffix("_*") for pattern, _, _ in rows("### Tasks")}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (CHECKOUT / target).exists(), target
