"""What a command is at, said on standard error while it takes its time. Results stay alone on standard output."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar

from hldm.runs.progress import QUIET, clock
from hldm.runs.signals import is_first_rank
from hldm.text.bytes import printable

PATIENCE = 3.0  # seconds that need no explanation


class Work:
    """How far a piece of work is."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.share: float | None = None  # of it that is done; None: not known

    def times(self) -> str:
        """What it has taken, and what it will take at this rate where that is known."""
        spent = time.monotonic() - self.began
        left = f", about {clock(spent / self.share - spent)} left" if self.share else ""
        return f"{clock(spent)} so far{left}"


_current: ContextVar[Work | None] = ContextVar("work", default=None)  # of the innermost `doing`


def reached(done: float, of: float) -> None:
    """Note how far the work is that is being done, so that what it says has an end."""
    work = _current.get()
    if work is not None:
        work.share = min(done / of, 1.0) if of > 0 else None


@contextmanager
def doing(what: str, first: float = PATIENCE, every: float = QUIET) -> Iterator[None]:
    """Say what is being done when it has taken `first` seconds, and again every `every` seconds until it is over."""
    work, is_over = Work(), threading.Event()

    def tell() -> None:
        wait = first
        while not is_over.wait(wait) and sys.stderr is not None:
            with suppress(OSError, ValueError):  # nobody reads it, or it is closed
                print(printable(f"hldm: {what}, {work.times()}"), file=sys.stderr, flush=True)
            wait = every

    if not is_first_rank():
        yield
        return
    thread = threading.Thread(target=tell, daemon=True)
    outer = _current.set(work)
    thread.start()
    try:
        yield
    finally:
        _current.reset(outer)
        is_over.set()
        thread.join(timeout=1)  # a line that nobody takes is not waited for


def loading() -> AbstractContextManager[None]:
    """While a command imports what it needs: on a terminal alone, which is silent for seconds otherwise."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    return doing("loading torch and diffusers") if on_terminal else nullcontext()
