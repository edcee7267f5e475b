"""Trained indexers, which choose the keys that a query sees, `index_topk` at most (DeepSeek-V3.2, arXiv 2512.02556).

A query that sees no more keys than that sees all of them, whatever its indexer says. So a method whose queries see at
most `index_topk` keys leaves an indexer nothing to choose, and the indexer is not computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lminf_eval.models.rope import set_forward


class SilencedIndexers:
    """Indexers of a model that compute nothing until `restore`; their layers are handed no keys' numbers."""

    def __init__(self, layers: list[Any]):
        indexers = [getattr(layer, "indexer", None) for layer in layers]
        self._found = [(one, vars(one).get("forward")) for one in indexers if isinstance(one, nn.Module)]
        for indexer, _ in self._found:
            indexer.forward = _nothing

    def restore(self) -> None:
        """Let the indexers choose again."""
        for indexer, forward in self._found:
            set_forward(indexer, forward)


def _nothing(hidden_BLE: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return hidden_BLE.new_empty(0, dtype=torch.int32)
