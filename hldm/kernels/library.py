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
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from hldm.text.bytes import printable

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
# What the compiler may do beyond the architecture's common ground; the second where it knows no first.
TUNINGS = (("-march=native",), ())
SECONDS = 900  # for the compiler, at most; measured: 16, and 336 on a machine with much else to do

logger = logging.getLogger(__name__)


class Kernels(NamedTuple):
    """What became of the kernels in this process."""

    library: ctypes.CDLL | None
    told: str  # in words, for `hldm doctor`


def library() -> ctypes.CDLL | None:
    """The kernels' functions, built at the first call in a process; None where there are none."""
    return kernels().library


@lru_cache(maxsize=1)
def kernels() -> Kernels:
    """The kernels, or why there are none."""
    if os.environ.get("HLDM_KERNELS") == "0":
        return Kernels(None, "off (HLDM_KERNELS=0)")
    try:
        path = build(cache_folder())
        found = Kernels(ctypes.CDLL(str(path)), f"{path}")
    except Exception as error:  # no home, no compiler, words that are no text: torch does the same, slower
        found = Kernels(None, f"none, torch does the same ({_in_one_line(error)})")
    logger.debug("C++ kernels: %s", found.told)
    return found


def cache_folder() -> Path:
    """Where libraries are kept, made if need be; ours alone, for what lies there is run.

    Raises OSError when it cannot be made or another user may write there, RuntimeError where there is no home.
    """
    asked = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(asked) if os.path.isabs(asked) else Path.home() / ".cache") / "hldm"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} must be this user's, and no other's to write to")
    return folder


def build(folder: Path) -> Path:
    """The library in folder, compiled if it is not there yet. Several processes may do so at once.

    Its name holds a hash of what it was made of, and one of what it holds: loading a damaged file may end the process.
    Raises OSError or SubprocessError where it cannot be.
    """
    compiler = _compiler()
    sources = sorted(SOURCES.iterdir())
    digest = hashlib.sha256()
    for part in (_run(*compiler, "--version", seconds=60), repr((FLAGS, TUNINGS)), _processor()):
        digest.update(part.encode())
    for source in sources:
        digest.update(source.read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}"
    if found := _whole(folder, name):
        return found
    units = [source for source in sources if source.suffix == ".cpp"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unfinished, whole = Path(scratch) / f"{name}.so", Path(scratch) / "kernels.cpp"
        # all in one: what they share is compiled once
        whole.write_text("".join(f'#include "{unit.resolve()}"\n' for unit in units), encoding="utf-8")
        for tuning in TUNINGS:
            try:
                _run(*compiler, *FLAGS, *tuning, str(whole), "-o", str(unfinished), seconds=SECONDS)
                break
            except subprocess.CalledProcessError:
                if tuning == TUNINGS[-1]:
                    raise
        # in a process of its own: half a file, as a full disk leaves it, would end this one
        _run(
            sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(unfinished), seconds=60
        )
        if found := _whole(folder, name):  # another process was faster
            return found
        path = folder / f"{name}-{_content(unfinished)}.so"
        unfinished.replace(path)  # whole or not at all
    return path


def _compiler() -> list[str]:
    """The command of a C++ compiler; CXX may hold several words, such as `ccache g++`. Raises FileNotFoundError."""
    asked = os.environ.get("CXX", "").strip()
    if asked:
        return [asked] if shutil.which(asked) else shlex.split(asked)
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise FileNotFoundError("no C++ compiler: c++, g++ or clang++ on the PATH, or CXX")
    return [found]


def _whole(folder: Path, name: str) -> Path | None:
    """The library of this name whose content is what it was when it was built; others are deleted."""
    for path in sorted(folder.glob(f"{name}*.so")):
        if path.is_file() and path.name == f"{name}-{_content(path)}.so":
            return path
        with suppress(OSError):
            path.unlink()
    return None


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _run(*command: str, seconds: float) -> str:
    # whatever language and encoding the compiler speaks
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=seconds
    )
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _in_one_line(error: BaseException) -> str:
    told = getattr(error, "stderr", None) or str(error) or type(error).__name__
    if isinstance(told, bytes):  # of a command that took too long
        told = told.decode("utf-8", "replace")
    return printable(" ".join(told.split()))[:200]
