"""What memory a piece of work takes at its peak, measured. No torch."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hldm.runs.machine import kibibytes


def peak_memory(work: Callable[[], Any]) -> tuple[int | None, int | None]:
    """The largest resident set of this process during some work, and how far above the one before; None off Linux."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # else the work takes what was freed before, and nothing grows
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        work()
        return None, None
    before = kibibytes("/proc/self/status")["VmRSS"]
    work()
    peak = kibibytes("/proc/self/status")["VmHWM"]
    return peak, max(peak - before, 0)
