"""Attention methods: each file is one rule of which keys a query sees, and at which positions.

A rule is made of branches (`branches.py`). `attention/reference.py` computes any rule from them; the fast paths are
written for the shapes of their key sets. To add a method, write one file and name its class in `registry.py`.

`lminf_eval.methods()` lists them: the module can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lminf_eval.methods.registry import MethodInfo


class _Methods(ModuleType):
    """This module. Python gives a package's attribute to its folder of the same name, so the folder lists methods."""

    def __call__(self) -> list[MethodInfo]:
        """List the attention methods: name, title, paper, summary and parameters of each."""
        from lminf_eval.methods.registry import METHODS, MethodInfo

        return [MethodInfo.of(method) for method in METHODS.values()]


sys.modules[__name__].__class__ = _Methods
