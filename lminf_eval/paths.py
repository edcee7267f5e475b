"""Where downloaded models, converted weights, filtered corpora, and the files that the wheel carries lie."""

import hashlib
import os
import sys
from pathlib import Path

DEMO_MODEL = "SmolLM2-135M-Instruct"  # its folder in `cache_home()`, once `lminf demo` has fetched it


def cache_home() -> Path:
    """The cache folder: `$LMINF_EVAL_HOME`, else `lminf-eval` in the user's own cache directory.

    The folder is named, not created. A relative or `~` path in a variable is taken as the shell would take it.
    """
    if home := os.environ.get("LMINF_EVAL_HOME"):
        return Path(home).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "lminf-eval"


def data_folder(name: str) -> Path:
    """Return the folder `name` ("tasks", "slurm"): inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_data" / name
    return installed if installed.is_dir() else package.parent / name


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal, read a block at a time."""
    digest = hashlib.sha256()
    with file.open("rb") as blocks:
        while block := blocks.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
