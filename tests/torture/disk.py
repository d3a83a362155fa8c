"""A disk that refuses, or a machine that dies, at one chosen call: what strace does, from inside the process."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hldm.runs import files


class Disk:
    """Counts the calls that change the disk, and does harm at one of them."""

    def __init__(self, fatal: int = 0, harm: Callable[[], None] | None = None) -> None:
        """fatal: which call, from 1; 0 harms none.  harm: raises, or kills; by default the disk is full."""
        self.calls: list[str] = []
        self.fatal = fatal
        self.harm = harm or refuse_with(errno.ENOSPC)

    def watch(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self.fatal:
                self.harm()
            return real(*arguments, **options)

        return call

    @contextmanager
    def watching(self) -> Iterator[Disk]:
        """Within, every call through which hldm.runs.files and hldm.runs.checkpoints change the disk is watched."""
        import safetensors.torch

        watched = [(os, name) for name in ("fsync", "rename", "mkdir", "rmdir", "unlink")]
        watched += [(safetensors.torch, "save_file")]
        real = [getattr(owner, name) for owner, name in watched]
        for (owner, name), function in zip(watched, real, strict=True):
            setattr(owner, name, self.watch(name, function))
        files.open = self.watch("open", open)  # type: ignore[attr-defined]
        try:
            yield self
        finally:
            del files.open  # type: ignore[attr-defined]
            for (owner, name), function in zip(watched, real, strict=True):
                setattr(owner, name, function)


def refuse_with(number: int) -> Callable[[], None]:
    """Harm: the call fails with this errno."""

    def refuse() -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def die() -> None:
    """Harm: kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def calls_of(work: Callable[[], Any]) -> int:
    """How many calls of `work` change the disk."""
    with Disk().watching() as disk:
        work()
    return len(disk.calls)


def disturb(work: Callable[[], int], number: int, injected: str) -> int:
    """Work, with `signal=KILL` or `error=NAME` at a call: strace's words for the same."""
    kind, _, name = injected.partition("=")
    harm = die if kind == "signal" else refuse_with(getattr(errno, name))
    with Disk(number, harm).watching():
        return work()
