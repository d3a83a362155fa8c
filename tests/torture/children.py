"""Child processes: forked (milliseconds), or started anew as a user would (seconds)."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HUNG = -1  # status of a child that had to be killed because it did not end


def fork(work: Callable[[], int | None], log: Path, environment: dict[str, str] | None = None) -> int:
    """Run `work` in a child whose output goes to `log` and whose exit code is what it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code: int | None = 70
    try:
        os.environ.update(environment or {})
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = 74
        os._exit(code or 0)


def wait(child: int, seconds: float = 900) -> int:
    """The child's status as a shell reports it, 128 + signal included; HUNG after so many seconds."""
    descriptor = os.pidfd_open(child)
    try:
        ended, _, _ = select.select([descriptor], [], [], seconds)
    finally:
        os.close(descriptor)
    if not ended:
        kill(child)
        return HUNG
    return shell_status(os.waitpid(child, 0)[1])


def shell_status(status: int) -> int:
    """What a shell makes of the status that waitpid gives."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def kill(child: int) -> int:
    """kill -9; returns the status, which is another than 137 when the child had ended by itself."""
    os.kill(child, signal.SIGKILL)
    return shell_status(os.waitpid(child, 0)[1])


def run(work: Callable[[], int | None], log: Path, seconds: float = 900) -> int:
    """Fork and wait."""
    return wait(fork(work, log), seconds)


def read_until(descriptor: int, word: bytes, seconds: float) -> bytes:
    """Everything that comes through a pipe up to `word`, or to its end, or until the time is up."""
    found = b""
    deadline = time.monotonic() + seconds
    while word not in found:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        data = os.read(descriptor, 65536) if ready else b""
        if not data:
            break
        found += data
    return found
