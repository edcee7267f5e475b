"""Runs at every start of Python, from the `.pth` file beside it, and waits until somebody imports lm-eval.

It is a module of its own, outside the package, so that it is one small file to load, and is there even where the
package is not (an editable install whose checkout was moved). `LMINF_EVAL_AUTOLOAD=0` switches it off.
"""

import os
import sys


class _Waiter:
    """Finds no module; hands over to `lminf_eval.harness.plugin` when lm-eval is first looked for."""

    def find_spec(self, name, path=None, target=None):
        if name == "lm_eval" and self in sys.meta_path:
            # A new list, since this thread, and maybe others, are walking through the old one.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
            try:
                from lminf_eval.harness import plugin
            except ImportError as error:
                import logging

                logging.getLogger("lminf_eval").warning(
                    "lminf-eval is installed but can't be imported, so lm-eval won't know it: %s", error
                )
            else:
                plugin.install()
        return None


if os.environ.get("LMINF_EVAL_AUTOLOAD") != "0":
    sys.meta_path.insert(0, _Waiter())
