"""In every Python that a test starts: lm-eval's own task files are parsed once for all, not for nine seconds in each.

Python imports a module of this name at its start. tests/conftest.py puts this folder on the path and names the file in
which what was parsed is kept for as long as the tests run. All else in lm-eval stays as it is.
"""

import os
import sys

AWAITED = "lm_eval.tasks._index"


class _Finder:
    """Finds what the others find, and changes the one module right after it is executed."""

    def find_spec(self, name, path=None, target=None):
        if name != AWAITED:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.load_yaml = _remembering(module.load_yaml, os.path.dirname(module.__file__))

        spec.loader.exec_module = exec_module
        return spec


def _remembering(load_yaml, tasks: str):
    import pickle
    from contextlib import suppress
    from pathlib import Path

    kept = Path(os.environ["LMINF_TESTS_PARSED"])
    if kept.exists():
        parsed = pickle.loads(kept.read_bytes())
    else:
        parsed = {}
        for path in Path(tasks).rglob("*.yaml"):
            with suppress(Exception):  # lm-eval will come upon the file too, and say so
                parsed[str(path)] = load_yaml(path, resolve_func=False)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_bytes(pickle.dumps(parsed))
        os.replace(partial, kept)

    def load(path, *, resolve_func=True, recursive=True, **more):
        if str(path) in parsed and recursive and not resolve_func:
            return dict(parsed[str(path)])
        return load_yaml(path, resolve_func=resolve_func, recursive=recursive, **more)

    return load


if "LMINF_TESTS_PARSED" in os.environ:
    sys.meta_path.insert(1, _Finder())  # the first is our plugin's
