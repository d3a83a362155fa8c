"""Where a result comes from: the code that made it, its libraries, its machine, its command."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from hldm.runs.files import atomic_write, sha256_of

LIBRARIES = ("torch", "numpy", "safetensors", "diffusers", "accelerate", "transformers", "datasets")
BITWISE = ("cpu", "threads", "accelerators", "torch")  # a resumed run repeats bit for bit only if these agree


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """sha256 of this package's sources, in hex: a commit that changes none of them changes no result."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cpp", ".h")):
        digest.update(f"{path.relative_to(package)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def describe_environment() -> dict[str, Any]:
    """What a reader needs to repeat a run: code, libraries, machine, command."""
    import torch

    here = Path(__file__)
    # Only if this very file is tracked: a site-packages folder inside someone's repository is not.
    is_tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None
    status = _git(here.parent, "status", "--porcelain") if is_tracked else None
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "commit": _git(here.parent, "rev-parse", "HEAD") if is_tracked else None,
        "dirty": None if status is None else status != "",
        "code": code_fingerprint(),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def write_environment(folder: Path, say: Callable[[str], None]) -> None:
    """Add this start to environment.json, a list with one entry a start."""
    path = folder / "environment.json"
    now = describe_environment()
    starts: list[dict[str, Any]] = []
    if path.exists():
        try:
            starts = json.loads(path.read_bytes())
            before = {key: starts[-1].get(key) for key in BITWISE}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged; delete it to resume without it") from error
        changes = [f"{key} {before[key]} -> {now[key]}" for key in BITWISE if before[key] != now[key]]
        if changes:
            say(f"{folder} resumes elsewhere ({', '.join(changes)}): right, but not equal bit for bit")
    atomic_write(path, json.dumps([*starts, now], indent=1) + "\n")


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; None outside a repository, or without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        names = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = None
    return names[1] if names else platform.processor() or platform.machine()
