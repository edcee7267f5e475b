"""Linear layers in float32 on AMD's processors: through oneDNN, where PyTorch takes MKL.

On another maker's processor MKL leaves AVX-512 unused, and multiplies one row with one thread. oneDNN, which PyTorch
carries for bfloat16 and for its compiler, reads the same weights where they lie: nothing is copied or repacked.
docs/benchmarks.md has what it brings. On Intel's processors MKL stays: there nobody has measured which is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from lminf_eval.models.rope import set_forward


class OneDNNLinearPatch:
    """The plain linear layers of a model, through oneDNN where that is faster, until `restore` is called.

    Quantised layers, those that a library has hooked or replaced, and other dtypes and devices stay as they are.
    """

    def __init__(self, model: nn.Module):
        self._forwards: dict[nn.Module, Callable] = {}
        for module in model.modules() if prefers_onednn() else ():
            if type(module) is nn.Linear and type(module.weight) is nn.Parameter and "forward" not in vars(module):
                self._forwards[module] = partial(_forward, module)
                set_forward(module, self._forwards[module])

    def restore(self) -> None:
        """The layers as they were found."""
        for module, forward in self._forwards.items():
            if vars(module).get("forward") is forward:
                del module.forward
        self._forwards.clear()


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias by the fastest way there is: x [..., in], weight [out, in], bias [out]; gives [..., out].

    Only float32 on a CPU goes another way than PyTorch's, and only where no gradient is wanted: it has none.
    """
    if (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and prefers_onednn()
    ):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return linear(x, weight, bias)


def _forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return product(x, module.weight, module.bias)


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN is there, and the faster one: on AMD's processors, in a PyTorch that has MKL."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    name = capabilities.get("cpu_name", "")
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return name.startswith("AMD") and there and torch.backends.mkl.is_available()
