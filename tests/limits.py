"""Commands in a process of little memory, and the CPU seconds that they take."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

# Each in turn, after what every one of them imports.
ASK = """
import json, shlex, sys, time
from hldm import cli
from hldm.generation import pipeline
from hldm.training import stages
ends = []
for words in sys.argv[1:]:
    began = time.process_time()
    ends.append((cli.main(shlex.split(words)), time.process_time() - began))
print(json.dumps(ends))
"""


class End(NamedTuple):
    """How a command ended: exit code, the line on standard error, CPU seconds from its first word."""

    code: int
    line: str
    seconds: float


def refused_under_limit(*commands: str, cwd: Path, address_space: int = 4_096_000_000) -> list[End]:
    """How commands of hldm end, one after another in a process under ulimit -v; each must say one line."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *commands],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space)),
    )
    assert done.returncode == 0, done.stderr
    lines, ends = done.stderr.splitlines(), json.loads(done.stdout.splitlines()[-1])
    assert len(lines) == len(ends) == len(commands), done.stderr
    return [End(code, line, seconds) for (code, seconds), line in zip(ends, lines, strict=True)]
