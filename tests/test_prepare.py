"""What `lminf prepare` finds, chooses, records and misses, without a network."""

import hashlib
import json
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import yaml

from lminf_eval.errors import UsageError
from lminf_eval.offline import manifest
from lminf_eval.offline.prefetch import prefetch

LISTING = [
    *("README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "onnx/model.onnx", "modeling_x.py"),
    *("model.fp16.safetensors", "sub/config.json", "sub/model.safetensors", "model-Q4.gguf", "training_args.bin"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    # What the variables do to modules that are imported after they are set.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(folder: Path, **content) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


def ours(model: Path, folder: Path, **changes) -> Path:
    """A configuration file of lm-eval on local data alone."""
    (folder / "book.txt").write_text("The sun is yellow, and the sky is blue. " * 60)
    metadata = {"length": 256, "data_files": str(folder / "book.txt")}
    return write(folder, model="lminf", model_args={"pretrained": str(model)}, metadata=metadata, **changes)


def test_everything_is_recorded_with_sizes_and_checksums(tmp_path, tiny_llama, capsys):
    model = tiny_llama()
    config = ours(model, tmp_path, tasks=["passkey_4k", "pg19_ppl_2k", "arxiv_ppl_2k"])
    assert prefetch(config) == 0
    record = json.loads((tmp_path / "run.prepared.json").read_text())["resolved"]
    assert [(entry["kind"], entry["name"]) for entry in record[:2]] == [
        ("pretrained", str(model)),
        ("task", "passkey_4k"),
    ]
    for file in record[0]["files"]:
        data = (model / file["path"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file["path"] for file in record[0]["files"]}
    assert record[1]["data"] == []
    for entry in record[2:]:
        (data,) = entry["data"]
        assert data["files"][0]["bytes"] == (tmp_path / "book.txt").stat().st_size
    assert capsys.readouterr().out.count("\nok ") == 4
    assert prefetch(config, check=True) == 0


def test_check_misses_what_is_gone_or_changed(tmp_path, tiny_llama, capsys):
    config = ours(tiny_llama(), tmp_path, tasks="pg19_ppl_2k")
    assert prefetch(config) == 0
    book = tmp_path / "book.txt"
    size = book.stat().st_size
    book.write_text(book.read_text() + "more")
    capsys.readouterr()
    assert prefetch(config, check=True) == 1
    assert (
        f"missing  {book}: {size + 4} bytes, and {size} when run.prepared.json was written" in capsys.readouterr().out
    )
    book.unlink()
    assert prefetch(config, check=True) == 1
    printed = capsys.readouterr().out
    assert "task pg19_ppl_2k: data_files" in printed
    assert f"missing  {book}: it was there" in printed


def test_what_is_not_here_is_a_line_each_and_nothing_is_written(tmp_path, tiny_llama, capsys):
    methods = [{"attention": "full"}, {"n_local": 32}]
    models = [
        {"pretrained": "someone/absent"},
        {"pretrained": str(tmp_path / "none")},
        {"pretrained": str(tiny_llama())},
    ]
    config = write(
        tmp_path, models=models, methods=methods, tasks=[{"task": "passkey", "lengths": [512]}, "pg19_ppl_2k"]
    )
    assert prefetch(config) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert "missing  model someone/absent: someone/absent is not in the hub's cache, nor a directory here" in lines
    assert f"missing  model {tmp_path / 'none'}: there is no such directory" in lines
    assert sum("emozilla/pg19-test" in line for line in lines) == 1
    assert len(lines) == len(set(lines))
    assert not (tmp_path / "run.prepared.json").exists()


def test_the_same_thing_is_resolved_once_for_all_methods(tmp_path):
    methods = [{"attention": "full"}, {"n_local": 32}, {"n_local": 64, "chunk_size": 8}]
    config = write(tmp_path, models=[{"pretrained": "a/b"}], methods=methods, tasks=["passkey_4k", "pydocs_ppl_2k"])
    found = [(item.kind, item.name) for item in manifest.required_items(config)]
    assert found == [("model", "a/b"), ("task", "passkey_4k"), ("task", "pydocs_ppl_2k")]


def test_tokenizers_and_adapters_named_apart(tmp_path):
    args = "pretrained=a/b,tokenizer=c/d,peft=e/f,n_local=4"
    found = [(item.kind, item.name) for item in manifest.required_items(write(tmp_path, model_args=args, tasks="x,y"))]
    assert found == [("model", "a/b"), ("tokenizer", "c/d"), ("peft", "e/f"), ("task", "x"), ("task", "y")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a", "YAML root must be a mapping"),
        ("a: [", "Invalid YAML"),
        ("modle: hf", "unknown key modle"),
        ("model: hf", "neither model_args nor tasks"),
        ("methods: [{}]\ntasks: [passkey]", "models"),
    ],
)
def test_a_file_that_is_neither_is_refused_in_one_line(content, said, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UsageError, match=said) as refused:
        prefetch(tmp_path / "run.yaml")
    assert "\n" not in str(refused.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.yaml"):
        prefetch(tmp_path / "absent.yaml")


def chosen(names=tuple(LISTING), kind="pretrained", **args):
    return set(manifest._chosen(names, kind, args))


def test_which_files_of_a_repository_are_read():
    texts = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt"}
    texts |= {"model.safetensors.index.json"}
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert chosen() == texts | shards
    assert chosen(kind="tokenizer") == texts
    assert chosen(variant="fp16") == texts | {"model.fp16.safetensors"}
    assert chosen(subfolder="sub") == texts | {"sub/config.json", "sub/model.safetensors"}
    assert chosen(gguf_file="model-Q4.gguf") == texts | {"model-Q4.gguf"}
    assert chosen(trust_remote_code=True) == texts | shards | {"modeling_x.py"}
    assert chosen([name for name in LISTING if "safetensors" not in name]) == texts - {
        "model.safetensors.index.json"
    } | {"pytorch_model.bin"}


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("model.safetensors", "has no weights"),
        ("config.json", "has no config.json"),
        ("tokenizer.json", "okenizer"),
    ],
)
def test_an_incomplete_folder_is_told(gone, said, tmp_path, tiny_llama, capsys):
    model = tiny_llama()
    (model / gone).unlink()
    assert prefetch(write(tmp_path, model_args={"pretrained": str(model)}), check=True) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert said in line


def test_a_missing_shard_is_named(tmp_path, tiny_llama, capsys):
    model = tiny_llama()
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert prefetch(write(tmp_path, model_args={"pretrained": str(model)}), check=True) == 1
    assert "lacks 1 of 2 weight files: model-00002-of-00002.safetensors" in capsys.readouterr().out
