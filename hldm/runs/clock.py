"""The clock that training stops by; and wall-clock time of pieces of work, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

K = TypeVar("K")
R = TypeVar("R")


def clock_named(name: str) -> Callable[[], float]:
    """Seconds that pass ("wall"), or that each thread of this process computed ("cpu")."""
    if name == "wall":
        return time.monotonic
    return lambda: time.process_time() / torch.get_num_threads()


def timed(work: Callable[[], R]) -> tuple[R, float]:
    """What a piece of work returns, and its seconds until an accelerator, if there is one, has done it."""
    began = time.perf_counter()
    result = work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return result, time.perf_counter() - began


def in_turns(
    works: Mapping[K, Callable[[], R]], turns: int, warm_up: int = 0
) -> dict[K, list[tuple[R, float]]]:
    """What each piece of work returns and takes, one after another, again and again: whatever slows a turn slows all.

    warm_up: turns before those that count
    """
    rounds = [{key: timed(work) for key, work in works.items()} for _ in range(warm_up + turns)]
    return {key: [found[key] for found in rounds[warm_up:]] for key in works}


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of figures of the same turns."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
