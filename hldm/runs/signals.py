"""SIGINT, SIGTERM and SIGUSR1 as one request to stop, honoured where it does no harm.

`Interrupt()` notes the request, and a training loop reads it between steps. `Interrupt(raises=True)` raises `Stopped`
in what runs within it, for work that has nothing to save. Contexts nest; the innermost decides. Python cannot run a
handler while the main thread is busy in C or waits for another rank, so a thread watches, too: a second signal ends
the process at once. The thread also stops a process whose launcher has died.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: what a cluster sends before time is up
# Ctrl-C in a terminal reaches launcher and worker, and then the launcher sends its own: one key press.
REPEAT_SECONDS = 1.0
# Cleaning up takes milliseconds. Longer means that it hangs, such as on a pipe that nobody reads.
LEAVE_SECONDS = 5.0
POLL_SECONDS = 0.5  # between two looks at the launcher and at the clock
# Set by torchrun, by `accelerate launch` of several processes (the first) and of one (the second).
LAUNCHER_MARKS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE")
LAUNCHER_WORDS = (b"accelerate", b"torchrun", b"torch.distributed", b"torch/distributed")


class Stopped(BaseException):
    """A signal asked to leave, and there is nothing to save. Not an Exception: no library swallows it."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupt:
    """Within this context SIGINT, SIGTERM and SIGUSR1 only set `requested`, or, with `raises`, raise Stopped.

    A request that came within, and that nobody acted on, is raised on the way out if the context around
    raises. A second signal, REPEAT_SECONDS or more after the first, ends the process at once, with exit code
    128 + its number. Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self, *, raises: bool = False) -> None:
        self.raises = raises
        self._is_open = False

    @property
    def requested(self) -> int | None:
        """Number of the signal that came, to this context or to one around it."""
        return _process.requested if self._is_open else None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            try:
                _process.open(self)
                self._is_open = True
                self._leave_if_requested()
            except Stopped:
                _process.close(self)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_open:
            around = _process.close(self)
            if around is not None and kind is None:
                around._leave_if_requested()
            self._is_open = False

    def _leave_if_requested(self) -> None:
        if self.raises and self.requested is not None:
            raise Stopped(self.requested)


def leave_in_one_line(work: Callable[[], int]) -> int:
    """Run; a signal ends it with one line on standard error and exit code 128 + its number."""
    try:
        with Interrupt(raises=True):
            return work()
    except Stopped as stopped:
        if is_first_rank():
            print(f"hldm: {stopped}", file=sys.stderr, flush=True)
        return 128 + stopped.signum


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all, before there is a process group to ask."""
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ  # a RANK that a shell exports


class _Process:
    """What a process has one of: handlers, and the thread that watches, while any Interrupt is open."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._contexts: list[Interrupt] = []  # innermost last
        self._raises_since = 0.0  # time.monotonic() of the last change of contexts
        self._previous: dict[signal.Signals, Any] = {}

    def open(self, context: Interrupt) -> None:
        """Enter a context; the first installs the handlers."""
        if not self._contexts:
            self.requested = None
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True)
            self._thread.start()
        self._contexts.append(context)
        self._raises_since = time.monotonic()

    def close(self, context: Interrupt) -> Interrupt | None:
        """Leave a context; the last restores what was. Returns the context around it."""
        del self._contexts[self._contexts.index(context) :]
        self._raises_since = time.monotonic()
        if self._contexts:
            return self._contexts[-1]
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._writer)  # ends the thread
        self._thread.join()
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number
            if self._contexts and self._contexts[-1].raises:
                if is_importing(frame):
                    with suppress(Exception):  # it may be in the middle of a flush, or closed
                        sys.stdout.flush()
                    leave_at_once(number)
                raise Stopped(number)

    def _watch(self, reader: int) -> None:
        """Python writes every signal to this pipe at once, whatever the main thread does."""
        first: tuple[int, float] | None = None  # number of the first signal, and when it came
        launcher = launcher_of_this_process()
        told_of_its_death = is_excused = False
        while True:
            if not select.select([reader], [], [], POLL_SECONDS)[0]:
                if launcher is not None and os.getppid() != launcher and not told_of_its_death:
                    told_of_its_death = is_excused = True
                    os.kill(os.getpid(), signal.SIGTERM)
                if first is not None:
                    self._leave_if_late(*first)
                continue
            numbers = os.read(reader, 64)
            if not numbers:
                os.close(reader)
                return
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if first is None:
                    first = number, time.monotonic()
                elif time.monotonic() - first[1] >= REPEAT_SECONDS and not is_excused:
                    os._exit(128 + number)
                is_excused = False  # the launcher's death is no second wish, what follows may be

    def _leave_if_late(self, number: int, since: float) -> None:
        contexts = self._contexts[-1:]  # a copy: the main thread may leave a context any time
        late = time.monotonic() - max(since, self._raises_since) > LEAVE_SECONDS
        if contexts and contexts[0].raises and late:
            leave_at_once(number)


_process = _Process()


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being loaded. An exception there may reach C++ that is being initialised, and abort it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def leave_at_once(number: int) -> NoReturn:
    """One line, and the end of the process without cleaning up."""
    if is_first_rank():
        os.write(2, f"hldm: {Stopped(number)}\n".encode())  # sys.stderr's lock may be held
    os._exit(128 + number)


def launcher_of_this_process() -> int | None:
    """Process number of the accelerate or torchrun that started this one; 0: it has died; None: there is none.

    Both the launcher's marks in the environment and, where there is a /proc, the parent's command line must say so:
    a run started by nohup lives on when its shell ends, whatever that shell exports.
    """
    if not any(mark in os.environ for mark in LAUNCHER_MARKS):
        return None
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:  # no /proc: the marks must do
        return parent
    if any(word in command for word in LAUNCHER_WORDS):
        return parent
    return 0 if parent == 1 else None
