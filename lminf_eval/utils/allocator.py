"""Control what the C library does with freed memory, for models on a CPU."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # as malloc.h numbers them


def keep_freed_memory() -> None:
    """Keep freed memory for this process's next tensors if the C library is glibc; otherwise do nothing.

    glibc returns large blocks to the system at once, so the next chunk's tensors fault in their pages again.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_MMAP_MAX, 0)  # blocks of any size come from the heap,
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)  # whose end is given back beyond 2 GiB alone
