"""In every Python that a test starts: what costs each process seconds, and no test is about, is done once for all.

Python imports a module of this name at its start; tests/conftest.py puts this folder on the path, and names a file in a
folder that is kept for as long as the tests run. There lie lm-eval's own task files, parsed (nine seconds in each
process), and PyTorch's description of the machine, which lm-eval puts into all results (a second, of pip's mostly).

Garbage is looked for less often: imports make hundreds of thousands of objects that stay. And packages that few users
have, but that transformers imports wherever they are, are as if they were not installed: those that conftest names, in
the processes that a test starts. All else stays as it is.
"""

import gc
import os
import sys


class _Finder:
    """Finds what the others find, and changes a module right after it is executed."""

    def __init__(self, changes: dict):
        self.changes = changes  # by name of the module

    def find_spec(self, name, path=None, target=None):
        change = self.changes.pop(name, None)
        if change is None:
            return None
        from importlib.util import find_spec

        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


def _kept(name: str):
    from pathlib import Path

    return Path(os.environ["LMINF_TESTS_PARSED"]).with_name(name)


def _keep(file, content: bytes) -> None:
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, file)


def _remember_tasks(module) -> None:
    """Of lm_eval.tasks._index: `load_yaml` knows lm-eval's own files."""
    import pickle
    from contextlib import suppress
    from pathlib import Path

    load_yaml, kept = module.load_yaml, _kept("tasks.pickle")
    if kept.exists():
        parsed = pickle.loads(kept.read_bytes())
    else:
        parsed = {}
        for path in Path(os.path.dirname(module.__file__)).rglob("*.yaml"):
            with suppress(Exception):  # lm-eval will come upon the file too, and say so
                parsed[str(path)] = load_yaml(path, resolve_func=False)
        _keep(kept, pickle.dumps(parsed))

    def load(path, *, resolve_func=True, recursive=True, **more):
        if str(path) in parsed and recursive and not resolve_func:
            return dict(parsed[str(path)])
        return load_yaml(path, resolve_func=resolve_func, recursive=recursive, **more)

    module.load_yaml = load


def _remember_machine(module) -> None:
    """Of torch.utils.collect_env: the description is made once."""
    describe, kept = module.get_pretty_env_info, _kept("machine.txt")

    def described():
        if not kept.exists():
            _keep(kept, describe().encode())
        return kept.read_text()

    module.get_pretty_env_info = described


if "LMINF_TESTS_PARSED" in os.environ:
    gc.set_threshold(200_000)
    for name in os.environ.get("LMINF_TESTS_WITHOUT", "").split():
        sys.modules[name] = None  # `import` and `find_spec` take it for absent
    changes = {"lm_eval.tasks._index": _remember_tasks, "torch.utils.collect_env": _remember_machine}
    sys.meta_path.insert(1, _Finder(changes))  # the first is our plugin's
