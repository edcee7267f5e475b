"""What a stock lm-eval sees of us, and what it must never notice."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lminf_eval.harness import plugin

CHECKOUT = Path(__file__).parent.parent

# The parts of lm-eval 0.4.13 that the plugin touches.
FAKE_LM_EVAL = {
    "__init__.py": "",
    "api/__init__.py": "",
    "api/registry.py": """
        class Registry(dict):
            def register(self, name, *, target):
                assert name not in self, "registered twice"
                self[name] = target

        model_registry = Registry()
    """,
    "models/__init__.py": """
        from lm_eval.api import registry
        registry.model_registry.register("hf", target="lm_eval.models.huggingface:HFLM")
    """,
    "api/task.py": """
        class Task:
            def build_all_requests(self, *, limit=None, tokenizer_name=""):
                return tokenizer_name
    """,
    "tasks/__init__.py": """
        from lm_eval.api.task import Task

        class TaskManager:
            def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
                self.include_path = self.searched = include_path
    """,
}
REPORT = """
import lm_eval.models, lm_eval.tasks
from lm_eval.api import registry
print(dict(registry.model_registry))
print(lm_eval.tasks.TaskManager().searched)
"""


@pytest.fixture
def fake_lm_eval(tmp_path):
    """`fake_lm_eval({file: source})` -> folder to import from, of an lm-eval with those files changed."""

    def make(changes=()) -> Path:
        for name, source in (FAKE_LM_EVAL | dict(changes)).items():
            path = tmp_path / "lm_eval" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source))
        return tmp_path

    return make


def python(code: str, *options: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a new Python, as a user's would start; `path` is imported from before anything installed."""
    variables = {name: value for name, value in os.environ.items() if name != "LMINF_EVAL_AUTOLOAD"} | environment
    if path:
        variables["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *options, "-c", code], env=variables, capture_output=True, text=True)


def test_a_start_of_python_loads_one_small_module():
    done = python("import sys; print(type(sys.meta_path[0]).__module__, *sys.modules)")
    first, *modules = done.stdout.split()
    assert first == "lminf_eval_autoload"
    bare = python("import sys; print(*sys.modules)", "-I", "-S").stdout.split()
    assert not set(modules) & {"torch", "transformers", "lm_eval", "lminf_eval", "importlib.metadata", "logging"}
    assert "logging" not in bare  # so the line above says something
    assert done.stderr == ""


def test_lm_eval_gets_the_model_and_the_tasks(fake_lm_eval):
    done = python(REPORT, path=fake_lm_eval())
    models, tasks = done.stdout.splitlines()
    assert models == "{'hf': 'lm_eval.models.huggingface:HFLM', 'lminf': 'lminf_eval.harness.lm:LMInfinite'}"
    assert tasks == str([plugin.task_folder()])
    assert done.stderr == ""


def test_the_variable_switches_it_off(fake_lm_eval):
    done = python("import sys; print(*map(str, sys.meta_path))" + REPORT, path=fake_lm_eval(), LMINF_EVAL_AUTOLOAD="0")
    finders, models, tasks = done.stdout.splitlines()
    assert "lminf" not in finders
    assert models == "{'hf': 'lm_eval.models.huggingface:HFLM'}"
    assert tasks == "None"


def test_an_lm_eval_that_reads_entry_points_is_left_to_find_the_model(fake_lm_eval):
    discovers = FAKE_LM_EVAL["api/registry.py"] + "\n        def load_plugins(group, registry): ...\n"
    done = python(REPORT, path=fake_lm_eval({"api/registry.py": discovers}))
    models, tasks = done.stdout.splitlines()
    assert models == "{'hf': 'lm_eval.models.huggingface:HFLM'}"
    assert tasks == str([plugin.task_folder()])


def test_the_entry_point_names_the_same_class():
    (entry,) = importlib.metadata.entry_points(group="lm_eval.models", name=plugin.MODEL_NAME)
    assert entry.value == plugin.MODEL_CLASS


def test_a_model_of_our_name_that_is_there_already_stays(fake_lm_eval):
    knows = FAKE_LM_EVAL["models/__init__.py"] + "    registry.model_registry.register('lminf', target='other:Model')"
    done = python(REPORT, path=fake_lm_eval({"models/__init__.py": knows}))
    assert "'lminf': 'other:Model'" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("api/registry.py", "MODELS = {}", "AttributeError after importing lm_eval.models"),
        ("tasks/__init__.py", "class TaskManager: pass", "TaskManager takes no include_defaults and no include_path"),
        ("tasks/__init__.py", "", "AttributeError after importing lm_eval.tasks"),
    ],
)
def test_an_lm_eval_changed_beyond_recognition_works_as_before(fake_lm_eval, file, source, complaint):
    changes = {file: source} | ({"models/__init__.py": ""} if file == "api/registry.py" else {})
    done = python("import lm_eval.models, lm_eval.tasks, lm_eval.tasks; print('fine')", path=fake_lm_eval(changes))
    assert done.stdout == "fine\n"
    assert done.stderr.count("lminf-eval does not know this release of lm-eval") == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_an_lm_eval_that_fails_to_import_fails_as_before_and_is_awaited_still(fake_lm_eval):
    fails_once = """
        import sys
        if not hasattr(sys, "tried"):
            sys.tried = True
            raise ImportError("first time")
    """
    first = """
try:
    import lm_eval.models
except ImportError as error:
    print(error)
"""
    done = python(first + REPORT, path=fake_lm_eval({"models/__init__.py": fails_once}))
    assert done.stdout.splitlines()[:2] == ["first time", "{'lminf': 'lminf_eval.harness.lm:LMInfinite'}"]


def test_without_lm_eval_its_absence_is_reported_as_usual():
    code = f"""
import sys
sys.path[:] = [folder for folder in sys.path if "site-packages" not in folder] + [{str(CHECKOUT)!r}]
try:
    import lm_eval
except ModuleNotFoundError as error:
    print(error.name)
"""
    done = python(code)
    assert done.stdout == "lm_eval\n"
    assert done.stderr == ""


def test_without_the_package_the_start_up_module_says_so_and_lm_eval_works(fake_lm_eval):
    folders = [str(CHECKOUT / "startup"), str(fake_lm_eval())]
    code = f"import sys; sys.path[:0] = {folders}; import lminf_eval_autoload" + REPORT
    done = python(code, "-I", "-S")
    assert done.stdout.splitlines() == ["{'hf': 'lm_eval.models.huggingface:HFLM'}", "None"]
    assert done.stderr == (
        "lminf-eval is installed but can't be imported, so lm-eval won't know it: No module named 'lminf_eval'\n"
    )


def test_afterwards_no_trace_of_the_finders_is_left(fake_lm_eval):
    code = """
import importlib, importlib.util, inspect, sys
before = importlib.util.find_spec("lm_eval.models").loader.get_source("lm_eval.models")
import lm_eval.models, lm_eval.tasks
for module in (lm_eval.models, lm_eval.tasks):
    print(type(module.__loader__).__name__, module.__spec__.loader is module.__loader__)
print(before == inspect.getsource(lm_eval.models))
print([finder for finder in sys.meta_path if "lminf" in type(finder).__module__])
importlib.reload(lm_eval.tasks)
"""
    done = python(code, path=fake_lm_eval())
    assert done.stdout.splitlines() == ["SourceFileLoader True", "SourceFileLoader True", "True", "[]"]
    assert done.stderr == ""


def test_threads_importing_at_once_register_once(fake_lm_eval):
    code = """
import importlib, threading
names = ["lm_eval.models", "lm_eval.tasks"] * 8
threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    done = python(code + REPORT, path=fake_lm_eval())
    assert done.stdout.count("lminf_eval.harness.lm:LMInfinite") == 1
    assert done.stdout.splitlines()[1] == str([plugin.task_folder()])
    assert done.stderr == ""


def test_installed_after_lm_eval_was_imported_it_works_at_once(fake_lm_eval):
    code = "import lm_eval.models, lm_eval.tasks; from lminf_eval.harness.plugin import install; install(); install()"
    done = python(code + REPORT, path=fake_lm_eval(), LMINF_EVAL_AUTOLOAD="0")
    assert "'lminf': 'lminf_eval.harness.lm:LMInfinite'" in done.stdout
    assert done.stdout.splitlines()[1] == str([plugin.task_folder()])


@pytest.fixture
def searched(monkeypatch):
    """The folders that the installed lm-eval's `TaskManager`, created last, looked for tasks in."""
    from lm_eval.tasks.manager import TaskIndex

    folders = []
    monkeypatch.setattr(TaskIndex, "build", lambda self, paths: folders.extend(map(str, paths)) or {})
    return folders


@pytest.mark.parametrize(
    ("include_path", "expected"),
    [
        (None, []),
        ("", []),
        ("mine", ["mine"]),
        (Path("mine"), ["mine"]),
        (["mine", Path("other")], ["mine", "other"]),
        (("mine",), ["mine"]),
        (plugin.task_folder(), [plugin.task_folder()]),
    ],
)
def test_a_users_own_folders_come_after_ours(include_path, expected, searched):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    defaults, *rest = searched
    assert defaults == str(Path(inspect.getfile(TaskManager)).parent)
    assert rest == list(dict.fromkeys([plugin.task_folder(), *expected]))
    assert manager.include_path == include_path


def test_positional_arguments_are_lm_evals_own(searched):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(None, "mine", False, {"length": 7})
    assert searched == ["mine"]
    assert manager.metadata == {"length": 7}


def test_without_lm_evals_defaults_ours_stay_away_too(searched):
    from lm_eval.tasks import TaskManager

    TaskManager(include_defaults=False)
    TaskManager(include_path=["mine"], include_defaults=False)
    assert searched == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "rank", "reads"),
    [
        (["--model", "lminf"], "1", False),
        (["--model=lminf"], "3", False),
        (["-M", "lminf"], "1", False),
        (["--model", "lminf"], "0", True),
        (["--model", "hf", "--output_path", "lminf"], "1", True),
        (["--tasks", "lminf"], "1", True),
    ],
)
def test_a_process_that_answers_rank_0_reads_no_tasks(arguments, rank, reads, searched, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *arguments])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    manager = TaskManager(include_path="mine")
    assert (len(searched) > 1) == reads
    assert manager.match_tasks(["passkey_32k"]) == ([] if reads else ["passkey_32k"])  # a task that nobody found


@pytest.mark.slow
def test_the_command_line_lists_our_tasks_and_a_users_task_of_the_same_name_wins(tmp_path):
    name = "passkey_4k"
    (tmp_path / "mine.yaml").write_text(f"task: {name}\ndataset_path: json\noutput_type: generate_until\n")
    listing = subprocess.run(
        [Path(sys.executable).parent / "lm_eval", "ls", "subtasks", "--include_path", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = {cells[1].strip(): cells[2].strip() for line in listing.splitlines() if len(cells := line.split("|")) > 3}
    assert rows[name] == str(tmp_path / "mine.yaml")
    assert Path(rows["passkey_8k"]).is_relative_to(plugin.task_folder())
