"""A reader sees the old content or the new one; nothing else is left behind."""

import os
import signal
import subprocess
import sys

import pytest

from lminf_eval.utils.atomic_write import atomic_path, check_writable, move_into_place, write_text


@pytest.mark.parametrize("sync", [False, True])
def test_a_write_replaces_the_content(tmp_path, sync):
    file = tmp_path / "a.json"
    write_text(file, "old")
    write_text(file, "Λ", sync=sync)
    assert file.read_text(encoding="utf-8") == "Λ"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("exclusive", [False, True])
def test_an_exception_leaves_the_old_content_and_nothing_else(tmp_path, exclusive):
    file = tmp_path / "a.json"
    file.write_text("old")

    def write_half() -> None:
        with atomic_path(file, exclusive=exclusive) as partial:
            partial.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_kill_leaves_the_old_content(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from lminf_eval.utils.atomic_write import atomic_path\n"
        "with atomic_path(Path(sys.argv[1]), exclusive=True) as partial:\n"
        "    partial.write_text('ha'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(file)]).returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    with atomic_path(file, exclusive=True) as partial:  # what the killed process left is overwritten
        partial.write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_two_processes_do_not_share_a_temporary_name(tmp_path):
    with atomic_path(tmp_path / "a") as partial:
        assert str(os.getpid()) in partial.name
        partial.write_text("")


def test_a_synchronised_folder_is_flushed_file_by_file_and_its_parent_afterwards(tmp_path, monkeypatch):
    source, target = tmp_path / "attempt", tmp_path / "result"
    (source / "model").mkdir(parents=True)
    (source / "model" / "results.json").write_text("{}")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    move_into_place(source, target, sync=True)
    assert flushed == [str(path) for path in (source, source / "model", source / "model" / "results.json", tmp_path)]
    assert (target / "model" / "results.json").read_text() == "{}"


def test_an_unwritable_place_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):  # noqa: PT011 (which one depends on the system)
        check_writable(tmp_path / "file" / "bench.json")
    check_writable(tmp_path / "new" / "bench.json")
    assert list((tmp_path / "new").iterdir()) == []
