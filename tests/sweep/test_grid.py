"""A sweep's file: the cells it stands for, and what is refused."""

from pathlib import Path

import pytest
import yaml

from lminf_eval.errors import UsageError
from lminf_eval.sweep.config import cells, read_sweep

CONFIGS = Path(__file__).parents[2] / "configs"
SMALLEST = {
    "models": [{"pretrained": "models/tiny", "dtype": "float32"}],
    "methods": [{"attention": "lambda", "n_local": 1024}, {"attention": "full"}],
    "tasks": ["passkey_4k", "pydocs_ppl_2k"],
}


def names(content) -> list[str]:
    return [cell.id for cell in cells(content)]


def test_every_model_under_every_method_on_every_task():
    found = cells(SMALLEST | {"limit": 3})
    assert [(cell.method, cell.task, cell.length) for cell in found] == [
        ("lambda n_local=1024", "passkey_4k", 4096),
        ("lambda n_local=1024", "pydocs_ppl_2k", 2048),
        ("full", "passkey_4k", 4096),
        ("full", "pydocs_ppl_2k", 2048),
    ]
    assert found[0].config(Path("journal"), Path("out")) == {
        "model": "lminf",
        "log_samples": True,
        "limit": 3,
        "model_args": {
            "journal": "journal",
            "pretrained": "models/tiny",
            "dtype": "float32",
            "attention": "lambda",
            "n_local": 1024,
        },
        "tasks": ["passkey_4k"],
        "output_path": "out",
    }


def test_lengths_take_the_task_of_that_name_or_the_metadata():
    found = cells(SMALLEST | {"tasks": [{"task": "passkey", "lengths": ["8k", 3000, 4096], "limit": 2}]})[:3]
    assert [(cell.task, cell.label, cell.length) for cell in found] == [
        ("passkey_8k", "passkey_8k", 8192),
        ("passkey_4k", "passkey_3000", 3000),
        ("passkey_4k", "passkey_4k", 4096),
    ]
    assert found[1].settings["metadata"] == {"length": 3000}
    assert all(cell.settings["limit"] == 2 for cell in found)


def test_a_family_of_tasks_is_all_its_lengths():
    found = cells(SMALLEST | {"methods": [{}], "tasks": ["openwebtext2_ppl"]})
    assert [cell.length for cell in found] == [2048, 4096, 8192, 16384, 32768]


def test_ids_follow_what_changes_an_answer_and_nothing_else():
    before = names(SMALLEST)
    assert len(set(before)) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzLM0123456789_-.") for name in before)
    for edit in ({"device": "cpu"}, {"batch_size": 4}, {"resources": {"gpus": 2}}, {"verbosity": "DEBUG"}):
        assert names(SMALLEST | edit) == before
    chunked = [method | {"chunk_size": 512} for method in SMALLEST["methods"]]
    assert names(SMALLEST | {"methods": chunked}) == before
    for edit in ({"limit": 5}, {"num_fewshot": 1}, {"metadata": {"seed": 1}}):
        assert not set(names(SMALLEST | edit)) & set(before)
    assert set(names(SMALLEST | {"tasks": ["passkey_8k", *SMALLEST["tasks"]]})) > set(before)


def test_a_cell_written_twice_is_one():
    assert names(SMALLEST | {"tasks": ["passkey_4k", {"task": "passkey", "lengths": [4096]}]}) == [
        name for name in names(SMALLEST) if "passkey" in name
    ]


def test_resources_of_a_model_and_of_a_task_come_before_the_sweep_s():
    found = cells(
        SMALLEST
        | {
            "models": [{"pretrained": "small"}, {"pretrained": "large", "resources": {"gpus": 8}}],
            "methods": [{}],
            "tasks": ["passkey_4k", {"task": "passkey_1m", "resources": {"time": "2-00:00:00"}}],
            "resources": {"gpus": 1, "time": "01:00:00"},
        }
    )
    given = [(cell.resources.gpus, cell.resources.time) for cell in found]
    assert given == [(1, "01:00:00"), (1, "2-00:00:00"), (8, "01:00:00"), (8, "2-00:00:00")]
    assert "resources" not in found[2].model_args


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"methds": []}, "unknown key methds (did you mean methods?)"),
        ({"limt": 3}, "unknown key limt (did you mean limit?)"),
        ({"limit": "ten"}, "limit='ten': lm-eval takes float | None"),
        ({"output_path": "here"}, "output_path: a sweep sets it itself"),
        ({"models": []}, "models=[]: list should have at least 1 item"),
        ({"models": [{"dtype": "float32"}]}, "models[0]: it has no pretrained"),
        ({"methods": [{"n_lcal": 4}]}, "unknown argument n_lcal=4 (did you mean n_local?)"),
        ({"methods": [{"attention": "lamda"}]}, "attention=lamda: must be one of lambda, full"),
        ({"tasks": ["passkey_5k"]}, "lm-eval knows no 'passkey_5k' (did you mean passkey_"),
        ({"tasks": [{"task": "passkey", "lengths": ["4q"]}]}, "lengths: '4q' is not a number of tokens"),
        ({"tasks": [{"task": "lambada_openai", "lengths": [4096]}]}, "tasks.lambada_openai: it takes no lengths"),
        ({"tasks": [{"task": "passkey_4k", "lenghts": [4]}]}, "unknown key tasks.passkey_4k.lenghts (did you mean"),
        ({"tasks": [{"lengths": [4]}]}, "tasks.0.task: it is missing"),
        ({"resources": {"gpu": 1}}, "unknown key resources.gpu (did you mean gpus?)"),
        ({"resources": {"time": 14400}}, 'resources.time=14400: must be in quotes, as in "04:00:00"'),
        (
            {"models": [{"pretrained": "a", "resources": 3}]},
            "models[0].resources=3: input should be a valid dictionary",
        ),
        ({"resources": {"time": "soon"}}, "resources.time='soon': string should match pattern"),
    ],
)
def test_mistakes_are_named(tmp_path, edit, message):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(SMALLEST | edit))
    with pytest.raises(UsageError) as error:
        read_sweep(file)
    assert str(error.value).startswith(f"lminf: {file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"), [("models: [", "not YAML"), ("- a", "a table with the keys"), (None, "read")]
)
def test_files_that_are_no_sweep(tmp_path, content, message):
    file = tmp_path / "sweep.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_sweep(file)


def test_the_sweeps_that_ship():
    sizes = {file.stem: len(read_sweep(file)) for file in CONFIGS.glob("*.yaml") if "models:" in file.read_text()}
    ablations = {
        "ablation_retrieval": 19,
        "ablation_n_global": 7,
        "ablation_parts": 5,
        "retrieval_limits": 54,
        "methods": 68,
    }
    assert sizes == {"demo": 12, "needles": 63, "paper_table": 80, "passkey_grid": 16, "modern": 72, **ablations}


def test_the_demo_s_own_sweep_is_the_demo_s():
    from lminf_eval.demo import run

    found = read_sweep(CONFIGS / "demo.yaml")
    samples = {}
    for cell in found:
        samples |= cell.settings["samples"]
    assert {task: tuple(numbers) for task, numbers in samples.items()} == run.WHOLE.documents
    methods = [dict(pair.split("=") for pair in method.model_args.split(",")) for method in run.METHODS]
    models = ("pretrained", "dtype")
    ours = [{n: str(value) for n, value in cell.model_args.items() if n not in models} for cell in found[::4]]
    assert ours == methods
    assert {cell.model for cell in found} == {run.DEMO_MODEL}


@pytest.mark.parametrize(
    ("name", "entries", "twin"),
    [
        ("models", [{"pretrained": "a"}, {"pretrained": "b"}, {"pretrained": "a"}], 2),
        ("methods", [{"n_local": 64}, {"attention": "lambda", "n_local": 64}], 1),
        ("tasks", ["passkey_4k", {"task": "passkey_4k"}], 1),
    ],
)
def test_an_entry_that_is_listed_twice_is_reported(name, entries, twin):
    content = {"models": [{"pretrained": "a"}], "methods": [{"n_local": 64}], "tasks": ["passkey_4k"], name: entries}
    with pytest.raises(UsageError, match=rf"{name}\[{twin}\]: the same as {name}\[0\]"):
        cells(content)
