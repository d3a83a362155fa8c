"""Commands in a process of little memory, and the CPU seconds that they take."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from conftest import ROOT


def run_limited(*command: str, address_space: int = 4_096_000_000, cwd: Path) -> tuple[int, str, float]:
    """Exit code, standard error, and seconds of CPU of a command under ulimit -v."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space)),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.returncode, done.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@lru_cache
def seconds_to_start() -> float:
    """CPU seconds that this machine takes to import torch, diffusers and the trainer, before anything is done."""
    code, error, seconds = run_limited("-c", "import hldm.cli, hldm.training.stages", cwd=ROOT)
    assert code == 0, error
    return seconds
