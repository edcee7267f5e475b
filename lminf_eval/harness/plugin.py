"""How a stock lm-eval finds the model `lminf` and our task folder.

lm-eval releases that read the entry points `lm_eval.models` find the model by themselves, but none looks for a task
folder. So `startup/lminf_eval_autoload.py` calls `install` when lm-eval is first imported, and the three functions that
know lm-eval's internals (`_register_model`, `_include_tasks`, `_key_requests`) run once their module was executed.
"""

import functools
import inspect
import itertools
import logging
import os
import sys

from lminf_eval.paths import data_folder

MODEL_NAME = "lminf"
MODEL_CLASS = "lminf_eval.harness.lm:LMInfinite"


def task_folder() -> str:
    """Return the absolute path of the folder of task definitions."""
    return str(data_folder("tasks"))


def install() -> None:
    """Tell lm-eval of us: now if it is imported already, else when it is. Calling it again changes nothing."""
    for name in list(_finder.pending):
        if name in sys.modules:
            _finder.act(name, sys.modules[name])
    if _finder.pending and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _register_model(_models) -> None:
    from lm_eval.api import registry

    if hasattr(registry, "load_plugins"):  # this lm-eval reads our entry point
        return
    if MODEL_NAME not in registry.model_registry:
        registry.model_registry.register(MODEL_NAME, target=MODEL_CLASS)


def _include_tasks(tasks) -> None:
    init = tasks.TaskManager.__init__
    signature = inspect.signature(init)
    if missing := {"include_path", "include_defaults"} - signature.parameters.keys():
        raise TypeError(f"TaskManager takes no {' and no '.join(sorted(missing))}")

    @functools.wraps(init)
    def init_with_our_tasks(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        if _answers_rank_0():
            call.arguments["include_defaults"] = False
            init(*call.args, **call.kwargs)
            self.match_tasks = list  # rank 0 checks the names
            return
        theirs = call.arguments["include_path"]
        paths = list(theirs) if isinstance(theirs, list | tuple) else [theirs] if theirs else []
        ours = task_folder()
        if call.arguments["include_defaults"] and ours not in map(os.path.realpath, paths):
            # lm-eval lets later folders override earlier ones: the user's come last.
            call.arguments["include_path"] = [ours, *paths]
        init(*call.args, **call.kwargs)
        self.include_path = theirs

    tasks.TaskManager.__init__ = init_with_our_tasks


def _key_requests(task) -> None:
    from lminf_eval.harness.answer_cache import keep_requests_apart

    keep_requests_apart(task.Task)


def _answers_rank_0() -> bool:
    """Whether this process is one of many that run `--model lminf`, and not the first: it will never look at a task.

    Reading the thousands of files of lm-eval's own tasks takes eight seconds of CPU, and a shared disk's time.
    """
    model = any(
        arg == f"--model={MODEL_NAME}" or (arg in ("--model", "-M") and value == MODEL_NAME)
        for arg, value in itertools.zip_longest(sys.argv, sys.argv[1:])
    )
    return model and os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


class _Loader:
    """A module's own loader, and one action after the module is executed."""

    def __init__(self, loader, act):
        self._loader = loader
        self._act = act

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._act(module.__name__, module)


class _Finder:
    """Lets the finders after it find the awaited modules, acts once each is executed, and is gone after the last."""

    def __init__(self, pending):
        self.pending = pending

    def find_spec(self, name, path=None, target=None):
        if name not in self.pending:
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self.act)
                return spec
        return None

    def act(self, name, module):
        action = self.pending.pop(name, None)
        if action is None:
            return
        if not self.pending:
            # A new list, since another thread may be walking through the old one.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        try:
            action(module)
        except Exception as error:  # whatever a future lm-eval may be like, importing it must not fail because of us
            logging.getLogger(__name__).warning(
                "lminf-eval does not know this release of lm-eval (%s after importing %s: %s); the model %r or the "
                "tasks in %s may be missing from it. LMINF_EVAL_AUTOLOAD=0 switches the attempt off.",
                type(error).__name__,
                name,
                error,
                MODEL_NAME,
                task_folder(),
            )


_finder = _Finder(
    {"lm_eval.models": _register_model, "lm_eval.tasks": _include_tasks, "lm_eval.api.task": _key_requests}
)
