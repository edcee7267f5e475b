"""LM-Infinite's Λ-attention, and the methods people compare it with, for transformers and lm-evaluation-harness.

    import lminf_eval as lminf

    with lminf.patch(model, method="lambda", n_local=2048):        # verified on entry, restored bit for bit at the end
        model(ids).logits                                          # any length
        model.generate(ids, past_key_values=lminf.Cache(model))    # bounded memory
    scores = lminf.score(model, tokenizer, text, method="lambda")  # chunked, any length
    lminf.methods()                                                # names, parameters, papers

Importing this costs nothing: a start-up hook of Python does it (see `harness/plugin.py`). The names are loaded when
they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lminf_eval.harness.lm import LMInfinite
    from lminf_eval.inference.api import TokenScores, patch, score
    from lminf_eval.models.cache import Cache

__version__ = "0.1.0"
__all__ = ["Cache", "LMInfinite", "TokenScores", "__version__", "methods", "patch", "score"]

_HOMES = {
    "Cache": "lminf_eval.models.cache",
    "LMInfinite": "lminf_eval.harness.lm",
    **dict.fromkeys(("TokenScores", "patch", "score"), "lminf_eval.inference.api"),
}


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("lminf_eval.methods")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
