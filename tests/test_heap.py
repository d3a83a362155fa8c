"""The heap is kept, on large pages, or left alone."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from hldm import heap

# What a process holds, in pages, when it has freed 200 MB in pieces below glibc's own limit for keeping them.
SCRIPT = """
import sys
from hldm.heap import keep_heap
kept = keep_heap() if sys.argv[1] == "kept" else None
pieces = [bytearray(b"x" * 1_000_000) for _ in range(200)]
del pieces
print(kept, open("/proc/self/statm").read().split()[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_freed_is_kept_for_the_next_step():
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("another C library than glibc")
    pages = {}
    for how in ("kept", "as it was"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        _, count = done.stdout.split()
        pages[how] = int(count)
    assert pages["kept"] > pages["as it was"] + 100_000_000 // 4096


def test_another_c_library_is_left_alone(monkeypatch):
    heap.keep_heap.cache_clear()
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert not heap.keep_heap()
    heap.keep_heap.cache_clear()
