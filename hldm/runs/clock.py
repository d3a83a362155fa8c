"""Wall-clock time of a piece of work, that of an accelerator included; and the clock that training stops by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds_of(work: Callable[[], Any]) -> float:
    """How long a piece of work takes, until the device has done it."""
    began = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - began


def clock_named(name: str) -> Callable[[], float]:
    """Seconds that pass ("wall"), or that each thread of this process computed ("cpu")."""
    if name == "wall":
        return time.monotonic
    return lambda: time.process_time() / torch.get_num_threads()


def wait_for_device() -> None:
    """Return when all that was asked of an accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
