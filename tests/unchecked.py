"""A patched model whose logits are not compared at load, for what only looks at a model: that is half of the time.

How each layer rotates is still found. The tests that run the same model have it checked as every user has.
"""

import pytest

from lminf_eval.models import equivalence_check


def unchecked(model, method):
    """`equivalence_check.patched_model`, without its comparisons of logits."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("own_logits", "_compare_logits"):
            patch.setattr(equivalence_check, name, lambda *args: None)
        return equivalence_check.patched_model(model, method)
