"""Freed memory is kept for the next tensor."""

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from lminf_eval.utils.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for prepare in (lambda: None, keep_freed_memory):
    prepare()
    for _ in range(16):  # as aligned blocks, they find their places only after some turns
        torch.ones(2**24)  # 64 MiB
    before = faults()
    for _ in range(8):
        torch.ones(2**24)
    print(faults() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's allocator"
)
def test_large_tensors_are_not_paid_for_again():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 8 * 2**26 / 65536  # a page is 64 KiB at the most
    assert kept < given_back / 10
