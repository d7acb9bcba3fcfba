"""The GPU of a process that may have none, or that has not loaded torch, and its memory."""

import resource
import sys
from typing import Any


def cuda() -> Any:
    """`torch.cuda` where torch is loaded and has a GPU, otherwise None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def peak_gb() -> float:
    """The most memory of the GPU, or without one of the process, so far."""
    if (gpu := cuda()) is not None:
        return gpu.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
