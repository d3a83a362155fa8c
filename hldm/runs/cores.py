"""Cores that other work shares: it makes a training of several threads many times slower, and nothing fails.

OpenMP's threads wait for each other by spinning, so one that is kept from its core holds up all the others. Linux
counts how long each thread could have run and was not let (/proc/PID/task/TID/schedstat).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

TASKS = Path("/proc/self/task")
EVERY = 10.0  # seconds that are looked at together
# Of their time that threads wait for a core: 0.67 to 0.85 measured beside other work on two cores, where two threads of
# configs/tiny.yaml are 4 to 15 times slower than one; 1/3 where one process takes its share of two cores; 0 alone.
SHARE = 0.2
LOOKS = 2  # in a row


def seconds_waited(tasks: Path = TASKS) -> float | None:
    """That the threads of this process have waited for a core, all together; None where the system does not say."""
    found = None
    for path in tasks.glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # a thread that has just ended
            found = (found or 0.0) + int(path.read_text().split()[1]) / 1e9
    return found


def is_crowded(waited: float, seconds: float, threads: int) -> bool:
    """Whether several threads wait for cores as they do where other work runs on one of them.

    waited: seconds of all threads together, of so many by the clock
    """
    return threads > 1 and seconds > 0 and waited / (threads * seconds) > SHARE


class Cores:
    """Looks at a training now and then, and says once that its threads are kept waiting."""

    def __init__(
        self,
        threads: int,
        waited: Callable[[], float | None] = seconds_waited,
        clock: Callable[[], float] = time.monotonic,
    ):
        """threads: that compute side by side;  waited: see `seconds_waited`."""
        self.threads, self.waited, self.clock = threads, waited, clock
        self.since = clock(), waited()
        self.crowded = 0  # looks in a row
        self.is_said = threads < 2 or self.since[1] is None

    def look(self, say: Callable[[str], None]) -> None:
        """Called after every step."""
        now = self.clock()
        began, before = self.since
        if self.is_said or now - began < EVERY:
            return
        waited = self.waited()
        if waited is None or before is None:
            return
        self.crowded = self.crowded + 1 if is_crowded(waited - before, now - began, self.threads) else 0
        self.since = now, waited
        if self.crowded >= LOOKS:
            self.is_said = True
            share = (waited - before) / (self.threads * (now - began))
            say(
                f"{self.threads} threads wait {share:.0%} of their time for a core that other work has, and then for "
                "each other: with OMP_NUM_THREADS=1 before the command it is usually several times faster (stop this "
                "one, and go on with --resume)"
            )
