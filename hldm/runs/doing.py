"""What a command is at, said on standard error while it takes its time. Results stay alone on standard output."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hldm.runs.progress import QUIET, clock
from hldm.runs.signals import is_first_rank
from hldm.text.bytes import printable

PATIENCE = 3.0  # seconds that need no explanation


@contextmanager
def doing(what: str, first: float = PATIENCE, every: float = QUIET) -> Iterator[None]:
    """Say what is being done when it has taken `first` seconds, and again every `every` seconds until it is over."""
    began, is_over = time.monotonic(), threading.Event()

    def tell() -> None:
        wait = first
        while not is_over.wait(wait) and sys.stderr is not None:
            with suppress(OSError, ValueError):  # nobody reads it, or it is closed
                line = f"hldm: {what}, {clock(time.monotonic() - began)} so far"
                print(printable(line), file=sys.stderr, flush=True)
            wait = every

    if not is_first_rank():
        yield
        return
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(timeout=1)  # a line that nobody takes is not waited for
