"""The journal's promises: what was added is found again, by anyone, whatever happened to the process or the files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lminf_eval.errors import UsageError
from lminf_eval.resume.journal import Journal, fingerprint

WHO = {"pretrained": "some/model", "dtype": "float32"}


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


@pytest.fixture
def written(tmp_path) -> Path:
    """A journal of three answers."""
    journal = Journal(tmp_path, WHO)
    for n in range(3):
        journal.add(journal.key("score", [1, 2, n], 1), [-n / 3, n == 1])
    journal.close()
    return tmp_path


def answers(folder: Path, who=WHO) -> list:
    journal = Journal(folder, who)
    found = [journal.get(journal.key("score", [1, 2, n], 1)) for n in range(3)]
    journal.close()
    return found


def test_answers_come_back_exactly(written):
    assert answers(written) == [[0.0, False], [-1 / 3, True], [-2 / 3, False]]


def test_every_part_of_a_request_is_in_its_key(tmp_path):
    journal = Journal(tmp_path, WHO)
    other = Journal(tmp_path, {**WHO, "dtype": "bfloat16"})
    keys = [
        journal.key("score", [1, 2], 1),
        journal.key("rolling", [1, 2], 1),
        journal.key("score", [1, 2], 2),
        journal.key("score", [2, 1], 1),
        journal.key("score", [1, 2, 0], 1),
        journal.key("generate", [1, 2], [16, ["\n"], {"top_k": 5}]),
        journal.key("generate", [1, 2], [16, ["\n"], {"top_k": 6}]),
        other.key("score", [1, 2], 1),
    ]
    assert len(set(keys)) == len(keys)
    assert journal.key("generate", [3], {"a": 1, "b": 2}) == journal.key("generate", [3], {"b": 2, "a": 1})


def test_another_model_finds_nothing(written):
    assert answers(written, {**WHO, "pretrained": "another/model"}) == [None] * 3


def test_each_process_has_a_file_and_reads_all(written):
    second = Journal(written, WHO)
    assert len(second) == 3
    second.add(second.key("score", [9], 1), [-9.0, False])
    second.add(second.key("score", [1, 2, 0], 1), [0.0, False])  # known already: not written again
    second.close()
    assert sorted(len(file.read_text().splitlines()) for file in files(written)) == [2, 4]
    third = Journal(written, WHO)
    assert len(third) == 4
    assert third.get(third.key("score", [9], 1)) == [-9.0, False]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_torn_last_line_is_dropped_silently(written, cut):
    (file,) = files(written)
    file.write_bytes(file.read_bytes()[:-cut])
    journal = Journal(written, WHO)
    assert len(journal) == 2
    assert journal.damaged == 0
    assert file.read_bytes().count(b"\n") == 3  # it is not rewritten


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b"0.333", b"0.334"),  # still valid JSON: only the checksum tells
        lambda line: line[: len(line) // 2],
        lambda line: b"\xff\x00" + line[2:],
        lambda line: b"[1, 2]",
        lambda line: b"",
    ],
)
def test_a_damaged_line_is_told_and_costs_itself_alone(written, damage, caplog):
    (file,) = files(written)
    lines = file.read_bytes().split(b"\n")
    lines[2] = damage(lines[2])
    file.write_bytes(b"\n".join(lines))
    with caplog.at_level("WARNING", logger="lm_eval"):
        assert answers(written) == [[0.0, False], None, [-2 / 3, False]]
    assert "1 damaged lines" in caplog.text


def test_a_damaged_first_line_costs_no_answer(written):
    (file,) = files(written)
    file.write_bytes(b"x" + file.read_bytes())
    assert answers(written) == [[0.0, False], [-1 / 3, True], [-2 / 3, False]]
    assert answers(written, {**WHO, "dtype": "bfloat16"}) == [None] * 3


def test_an_answer_is_on_disk_before_add_returns(tmp_path):
    code = (
        "import os, sys; from lminf_eval.resume.journal import Journal\n"
        "journal = Journal(sys.argv[1], {'dtype': 'float32', 'pretrained': 'some/model'})\n"
        "journal.add(journal.key('score', [1, 2, 0], 1), [-1.0, True]); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert killed.returncode == -9
    assert answers(tmp_path) == [[-1.0, True], None, None]


def test_a_file_in_the_folder_s_place_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match=r"journal=.*taken: .* must be a folder that can be written"):
        Journal(tmp_path / "taken", WHO)


@pytest.fixture
def mounted(tmp_path):
    """`mounted(options)` -> a small tmpfs; skips where mounting isn't allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"can't mount: {done.stderr.strip()}")
        return folder

    yield mount
    while os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_read_only_folder_is_refused_at_once(mounted):
    with pytest.raises(UsageError, match="Read-only file system; it must be a folder that can be written"):
        Journal(mounted("size=64k,ro"), WHO)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(mounted):
    folder = mounted("size=16k")
    journal = Journal(folder, WHO)

    def fill():
        for n in range(10_000):
            journal.add(journal.key("score", [n], 1), [-float(n), False])

    with pytest.raises(UsageError, match=r"No space left on device while writing; all (\d+) answers before are kept"):
        fill()
    kept = len(journal)
    journal.close()
    assert kept > 50
    assert (folder / files(folder)[0].name).stat().st_size == 16 * 1024  # full to the last byte
    subprocess.run(["mount", "-o", "remount,size=64k", str(folder)], check=True)  # room is made
    again = Journal(folder, WHO)
    assert len(again) == kept
    assert again.damaged == 0
    assert all(again.get(again.key("score", [n], 1)) == [-float(n), False] for n in range(kept))
    again.add(again.key("score", [kept], 1), [1.0, True])
    again.close()


def test_the_fingerprint_follows_the_weights_and_not_the_place(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64}))
    before = fingerprint(folder)
    (folder / "README.md").write_text("no weights")
    moved = folder.rename(tmp_path / "moved")
    assert fingerprint(moved) == before
    (moved / "config.json").write_text(json.dumps({"hidden_size": 65}))
    changed = fingerprint(moved)
    assert changed != before
    os.utime(moved / "model.safetensors", ns=(1, 1))
    assert fingerprint(moved) != changed
