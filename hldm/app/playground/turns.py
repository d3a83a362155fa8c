"""One model, several users: each writes a chunk in turn, first come first served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

MOST_WAITING = 16


class Busy(Exception):
    """More wait than will be served in a while."""


class Turns:
    """A lock that is given in the order it was asked for, which threading.Lock does not promise."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for one's turn. Raises Busy where MOST_WAITING are there already."""
        mine = object()
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                raise Busy(f"{MOST_WAITING} others are writing: try again in a moment")
            self._waiting.append(mine)
            self._changed.wait_for(lambda: self._waiting[0] is mine)
        try:
            yield
        finally:
            with self._changed:
                self._waiting.remove(mine)
                self._changed.notify_all()
