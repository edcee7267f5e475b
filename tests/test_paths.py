"""The cache folder on each system, and the variable that moves it."""

from pathlib import Path

import pytest

from lminf_eval.paths import cache_home


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("LMINF_EVAL_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("platform", "folder"),
    [("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")],
)
def test_default_on_each_system(monkeypatch, clean, platform, folder):
    monkeypatch.setattr("sys.platform", platform)
    assert cache_home() == clean / folder / "lminf-eval"


@pytest.mark.parametrize(("platform", "variable"), [("linux", "XDG_CACHE_HOME"), ("win32", "LOCALAPPDATA")])
def test_the_systems_own_variable(monkeypatch, clean, platform, variable):
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv(variable, str(clean / "elsewhere"))
    assert cache_home() == clean / "elsewhere" / "lminf-eval"


def test_own_variable_wins_and_is_the_folder_itself(monkeypatch, clean):
    monkeypatch.setenv("XDG_CACHE_HOME", str(clean / "elsewhere"))
    monkeypatch.setenv("LMINF_EVAL_HOME", "~/big/disk")
    assert cache_home() == clean / "big" / "disk"
    monkeypatch.setenv("LMINF_EVAL_HOME", "here")
    assert cache_home() == Path.cwd() / "here"
