"""Wall-clock time of a piece of work, that of an accelerator included."""

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


def wait_for_device() -> None:
    """Return when all that was asked of an accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
