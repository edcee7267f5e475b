"""Write files so that a reader, or the next process after a kill, sees the old content or the new one, never a part.

Everything is written under a temporary name in the target's own folder, then renamed over the target.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(file: Path, *, sync: bool = False, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `file` at the end of the block, or delete it on an exception.

    Args:
        sync: Flush the content to the disk before the rename, and the rename itself, so that both survive a power cut.
        exclusive: The caller holds a lock, so no other process writes `file` now. The temporary name is then always
            the same, and what a killed writer left is overwritten. Otherwise the name contains the process id.

    Raises:
        OSError: if the rename fails, besides whatever the block raises.
    """
    partial = file.with_name(f"{file.name}.partial" if exclusive else f"{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        move_into_place(partial, file, sync=sync)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str, *, sync: bool = False) -> None:
    """Replace the content of `file` with `text`, in UTF-8.

    Raises:
        OSError: if it cannot be written. The file is then as it was.
    """
    with atomic_path(file, sync=sync) as partial:
        partial.write_text(text, encoding="utf-8")


def move_into_place(source: Path, target: Path, *, sync: bool = False) -> None:
    """Rename a complete file or folder to `target`, on the same disk.

    Args:
        sync: Flush its content to the disk before the rename, and the rename itself afterwards.
    """
    if sync:
        for path in (source, *source.rglob("*")) if source.is_dir() else (source,):
            _flush(path)
    os.replace(source, target)
    if sync:
        _flush(target.parent)


def check_writable(file: Path) -> None:
    """Create the folder of `file`, and raise an `OSError` if the file could not be written there.

    A long computation calls this before it starts, so that it does not fail at its end.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    probe = file.with_name(f"{file.name}.{os.getpid()}.partial")
    probe.touch()
    probe.unlink()


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # only POSIX systems can open a folder
        return
    # Windows flushes only files that are open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
