"""C++ kernels, compiled when one is first asked for, and nothing at all where that cannot be done.

The sources in hldm/kernels/cpp become one shared library with a plain C interface, called through ctypes: some seconds
of the machine's own compiler, no headers of torch, no lock held while it computes. It is kept in the user's cache
folder under a hash of all that it depends on. Without a compiler (or with HLDM_KERNELS=0) `library()` is None, and the
forms of `hldm.kernels` do the same in torch or decline. Knows nothing of what the kernels mean.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
# What the compiler may do beyond the architecture's common ground; the second where it knows no first.
TUNINGS = (("-march=native",), ())
SECONDS = 900  # for the compiler, at most; measured: 16, and 336 on a machine with much else to do

_WANTED = ContextVar("wanted", default=True)

logger = logging.getLogger(__name__)


class Kernels(NamedTuple):
    """What became of the kernels in this process."""

    library: ctypes.CDLL | None
    told: str  # in words, for `hldm doctor`


def library() -> ctypes.CDLL | None:
    """The kernels' functions, built at the first call in a process; None where there are none."""
    return kernels().library if _WANTED.get() else None


@lru_cache(maxsize=1)
def kernels() -> Kernels:
    """The kernels, or why there are none."""
    if os.environ.get("HLDM_KERNELS") == "0":
        return Kernels(None, "off (HLDM_KERNELS=0)")
    try:
        path = build(cache_folder())
        found = Kernels(ctypes.CDLL(str(path)), f"{path}")
    except (OSError, subprocess.SubprocessError) as error:
        found = Kernels(None, f"none, torch does the same ({_in_one_line(error)})")
    logger.debug("C++ kernels: %s", found.told)
    return found


@contextmanager
def without_kernels() -> Iterator[None]:
    """Torch alone within, as on a machine without a compiler: to compare with."""
    token = _WANTED.set(False)
    try:
        yield
    finally:
        _WANTED.reset(token)


def cache_folder() -> Path:
    """Where libraries are kept, made if need be; ours alone, for what lies there is run.

    Raises OSError when it cannot be made or another user may write there.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hldm"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} must be this user's, and no other's to write to")
    return folder


def build(folder: Path) -> Path:
    """The library in folder, compiled if it is not there yet. Several processes may do so at once.

    Raises OSError or SubprocessError where it cannot be.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: c++ or g++ on the PATH, or CXX")
    sources = sorted(SOURCES.iterdir())
    digest = hashlib.sha256()
    for part in (_run(compiler, "--version"), repr((FLAGS, TUNINGS)), _processor()):
        digest.update(part.encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if path.exists():
        return path
    units = [source for source in sources if source.suffix == ".cpp"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unfinished, whole = Path(scratch) / path.name, Path(scratch) / "kernels.cpp"
        # all in one: what they share is compiled once
        whole.write_text("".join(f'#include "{unit.resolve()}"\n' for unit in units))
        for tuning in TUNINGS:
            try:
                _run(compiler, *FLAGS, *tuning, str(whole), "-o", str(unfinished))
                break
            except subprocess.CalledProcessError:
                if tuning == TUNINGS[-1]:
                    raise
        unfinished.replace(path)  # whole or not at all
    return path


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _in_one_line(error: BaseException) -> str:
    told = getattr(error, "stderr", None) or str(error)
    return " ".join(told.split())[:200]
