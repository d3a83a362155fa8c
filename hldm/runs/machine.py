"""Memory, GPU memory and disk of this machine: how much is available, how much a piece of work took."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil


def available_memory(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> tuple[int, str]:
    """Bytes that this process can have in all, what it holds already included, and what sets the limit.

    The least of the machine's, the cgroup's (a container's, a job's) and ulimit -v's.
    """
    own, free = psutil.Process().memory_info(), psutil.virtual_memory().available
    limits = [(free + own.rss, "on this machine")]
    limits += [(free + own.rss, "in this cgroup") for free in _cgroup_memory(groups, root)]
    virtual, _ = resource.getrlimit(resource.RLIMIT_AS)
    if virtual != resource.RLIM_INFINITY:
        limits.append((virtual - own.vms + own.rss, "under ulimit -v"))
    least, where = min(limits)
    return max(least, 0), where


def _cgroup_memory(groups: Path, root: Path) -> Iterator[int]:
    """Bytes still free in every cgroup with a limit that this process is in, version 1 or 2."""
    lines = groups.read_text().splitlines() if groups.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        place = base / path.lstrip("/")
        # A container may see its own group as the root, whatever the path says.
        for folder in (place, *(above for above in place.parents if above.is_relative_to(base))):
            try:
                most, used = (int((folder / name).read_text()) for name in (limit, usage))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # not there, or "max": no limit
                continue
            yield most - used + int(stat.get(cache, 0))  # files read once are dropped when memory is short


def peak_memory(work: Callable[[], Any]) -> tuple[int | None, int | None]:
    """The largest resident set of this process during some work, and how far above the one before; None off Linux."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # else the work takes what was freed before, and nothing grows
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        work()
        return None, None
    before = psutil.Process().memory_info().rss
    work()
    (peak,) = re.findall(r"VmHWM:\s*([0-9]+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(peak), max(1024 * int(peak) - before, 0)


def gpu_memory() -> int | None:
    """Bytes free on this process' GPU; None where there is none."""
    import torch  # here: `hldm doctor` asks for the rest without

    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0]


def free_disk(folder: Path) -> tuple[int, Path]:
    """Bytes free where a folder is or would be made, and the folder that stands there already."""
    standing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    return shutil.disk_usage(standing).free, standing


def human(count: int) -> str:
    """1536 -> 1.5 KiB, to about three digits."""
    for exponent, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**exponent:
            size = count / 1024**exponent
            return f"{size:,.0f} {unit}" if size >= 100 else f"{size:.3g} {unit}"
    return f"{count} bytes"
