"""Fetch and test everything that a run reads, so that the run itself needs no network (`lminf prepare`)."""

from __future__ import annotations

import json
import logging
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lminf_eval import __version__
from lminf_eval.errors import UsageError
from lminf_eval.utils.atomic_write import write_text
from lminf_eval.utils.formatting import format_bytes

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_PATIENCE = 10  # seconds that the hub has to answer


def prefetch(config: Path, check: bool = False, output: Path | None = None) -> int:
    """Fetch the models and data of a sweep's file or of lm-eval's own configuration file, and build every task.

    Write what was resolved as JSON to `output`, by default CONFIG.prepared.json: names, commits, sizes in bytes and
    SHA-256. With `check`, or if the hub does not answer, fetch nothing; with `check` also write nothing, and count
    files that differ from the JSON as missing.

    Returns:
        0, or 1 if anything is missing, after a line for each.

    Raises:
        UsageError: for a file that cannot be read, or is neither.
    """
    console = Console(highlight=False, soft_wrap=True)
    record = output or config.with_name(f"{config.stem}.prepared.json")
    if not check and (reason := _unreachable()):
        console.print(Text(f"cannot fetch anything ({reason}); checking the local files only"))
    if check or reason:
        os.environ.update(OFFLINE)
    # These read the variables when they are imported.
    from huggingface_hub.utils import disable_progress_bars

    from lminf_eval.offline import manifest

    if not console.is_terminal:
        disable_progress_bars()
    logging.getLogger("lm_eval.api").setLevel(logging.ERROR)  # it explains --metadata at every task
    found, missing = [], []
    for item in manifest.required_items(config):
        line = ""
        with console.status(Text(f"{item.kind} {item.name}")):
            try:
                resolved = item.resolve(checksums=not check)
            except Exception as error:  # a task is anyone's code: report whatever stops it, and go on
                resolved, line = None, manifest.describe_error(error)
        if resolved is None and line not in missing:  # what one task lacks, the next one may too
            missing.append(line)
            console.print(Text(f"missing  {item.kind} {item.name}: {line}", style="red"))
        elif resolved is not None:
            found.append(resolved)
            console.print(Text(f"ok       {item.kind} {item.name}{_summary(resolved)}"))
    if check and record.is_file():
        changed = _changed(record)
        for line in changed:
            console.print(Text(f"missing  {line}", style="red"))
        missing += changed
    if not check and not missing:
        try:
            write_text(record, json.dumps({"lminf_eval": __version__, "resolved": found}, indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"output {record}: cannot be written ({error.strerror})") from error
        console.print(Text(f"Everything is available; set HF_HUB_OFFLINE=1 to run without the hub. Written: {record}"))
    return int(bool(missing))


def _unreachable() -> str:
    """Return why the hub cannot be reached, or "" if it can. Ask once, since its client retries for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_PATIENCE).close()
    except urllib.error.HTTPError:  # it answers, if not to this
        return ""
    except OSError as error:
        reason = getattr(error, "reason", error)
        # The hub's own client may know certificates that Python does not.
        return "" if isinstance(reason, ssl.SSLError) else f"{endpoint} does not answer: {reason}"
    except ValueError:
        raise UsageError(f"HF_ENDPOINT={endpoint}: must be an address with https:// or http://") from None
    return ""


def _summary(resolved: dict) -> str:
    """Return commit and size of what was resolved, for its line."""
    parts = [resolved, *resolved.get("data", [])]
    size = sum(file["bytes"] for part in parts for file in part.get("files", []))
    commits = [part["commit"][:12] for part in parts if "commit" in part]
    return "".join([*(f", {commit}" for commit in commits), f", {format_bytes(size)}" if size else ""])


def _changed(record: Path) -> list[str]:
    """Return the files of the JSON that are gone, or have another size."""
    try:
        entries = json.loads(record.read_text())["resolved"]
        parts = [part for entry in entries for part in (entry, *entry.get("data", []))]
        files = [
            (Path(part["folder"], file["path"]), file["bytes"]) for part in parts for file in part.get("files", [])
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{record}: it is not what lminf prepare writes ({type(error).__name__})") from error
    gone = [f"{file}: it was there when {record.name} was written" for file, _ in files if not file.is_file()]
    sizes = [(file, size, file.stat().st_size) for file, size in files if file.is_file()]
    return gone + [
        f"{file}: {now} bytes, and {size} when {record.name} was written" for file, size, now in sizes if now != size
    ]
