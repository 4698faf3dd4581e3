"""Whether this host can have a GPU in use at all, told without torch."""

from __future__ import annotations

import ctypes
import sys

NO_GPU = (
    "the backend cuda needs an NVIDIA GPU that torch can use, and there is none; "
    "run with --backend torch, or install torch for CUDA"
)


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed: without it no GPU is in use, with it one may be."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
