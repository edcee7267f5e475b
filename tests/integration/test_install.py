"""The built wheel, alone in a virtual environment, from an unrelated folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from lminf_eval import __version__

CHECKOUT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(CHECKOUT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("lminf_eval-*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """Script folder of a virtual environment with our wheel; its dependencies are those of the tests' environment."""
    root = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    folder = root / Path(sysconfig.get_path("scripts")).relative_to(sys.prefix)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site_packages,) = root.glob("[Ll]ib/**/site-packages")
    # A plain folder on the path: the .pth files in it, such as those of an editable install of ours, are not read.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(command: list, folder: Path) -> str:
    """Standard output of `command`, run in `folder` as a user without settings of ours would, but tests/startup."""
    variables = {name: value for name, value in os.environ.items() if name != "LMINF_EVAL_AUTOLOAD"}
    variables["PYTHONPATH"] = str(CHECKOUT / "tests" / "startup")
    done = subprocess.run([str(word) for word in command], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_carries_the_tasks_the_hook_and_the_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("/entry_points.txt")).removesuffix("entry_points.txt")
        entry_points = archive.read(metadata + "entry_points.txt").decode()
        requirements = archive.read(metadata + "METADATA").decode()
    tasks = {f"lminf_eval/_data/{path.relative_to(CHECKOUT).as_posix()}" for path in CHECKOUT.glob("tasks/**/*.yaml")}
    assert tasks
    assert tasks <= names
    assert {"lminf_eval_autoload.pth", "lminf_eval_autoload.py", metadata + "licenses/LICENSE"} <= names
    assert "[lm_eval.models]\nlminf = lminf_eval.harness.lm:LMInfinite" in entry_points
    assert "[console_scripts]\nlminf = lminf_eval.cli.app:app" in entry_points
    assert "Requires-Python: >=3.10" in requirements
    top = {name.split("/")[0] for name in names}
    assert top == {"lminf_eval", metadata.rstrip("/"), "lminf_eval_autoload.pth", "lminf_eval_autoload.py"}


def test_lm_eval_knows_the_model(scripts, tmp_path):
    code = "import lm_eval.models; from lm_eval.api.registry import model_registry; print('lminf' in model_registry)"
    assert run([scripts / "python", "-c", code], tmp_path) == "True\n"


def test_lm_eval_lists_the_tasks_of_the_wheel(scripts, tmp_path):
    listing = run([scripts / "python", "-m", "lm_eval", "ls", "tasks"], tmp_path)
    row = next(line for line in listing.splitlines() if line.startswith("|passkey_32k "))
    assert str(scripts.parent) in row
    assert "lminf_eval/_data/tasks/passkey" in row


def test_the_command_answers(scripts, tmp_path):
    assert run([scripts / "lminf", "--version"], tmp_path) == f"lminf-eval {__version__}\n"
