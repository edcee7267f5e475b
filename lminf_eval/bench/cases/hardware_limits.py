"""What the hardware reaches in the model's dtype: the speed of a large matrix product and of a large copy."""

from __future__ import annotations

import torch

from lminf_eval.bench.record import Record
from lminf_eval.bench.roofline import HardwareLimits, Work
from lminf_eval.bench.timing import ProgressFn, interleave
from lminf_eval.models.onednn_linear import product

CASE = "ceilings"  # the name of its record in results files
RUNS = 5


@torch.inference_mode()
def measure_hardware(dtype: torch.dtype, device: torch.device | str, progress: ProgressFn) -> Record:
    """Measure the seconds of a square matrix product (2048, on CUDA 8192 rows) and of copying 256 MB (on CUDA 2 GB)."""
    cuda = torch.device(device).type == "cuda"
    rows, size = (8192, 2**31) if cuda else (2048, 2**28)
    a, b = (torch.randn(rows, rows, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(size // dtype.itemsize, dtype=dtype, device=device) for _ in range(2))
    sides = {"matrix product": lambda: product(a, b), "copy": lambda: target.copy_(source)}
    values, skipped = interleave(sides, RUNS, device, progress)
    work = {"matrix product": Work(2.0 * rows**3), "copy": Work(0.0, 2.0 * size)}
    return Record(CASE, {}, values, work=work, skipped=skipped)


def hardware_limits(record: Record) -> HardwareLimits:
    """Return operations and bytes a second of the fastest runs; the copy's bytes count as read and as written."""
    product, copy = record.work["matrix product"], record.work["copy"]
    return HardwareLimits(product.flops / min(record.values["matrix product"]), copy.bytes / min(record.values["copy"]))
