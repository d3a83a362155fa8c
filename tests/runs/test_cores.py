"""Threads that are kept from their cores are noticed, said once, and never where nothing keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hldm.runs.cores import EVERY, LOOKS, SHARE, Cores, is_crowded, seconds_waited


def test_what_linux_counts_of_every_thread_is_summed_and_other_systems_say_nothing(tmp_path):
    for number, line in enumerate(("5000000000 1500000000 7\n", "1 500000000 1\n", "torn")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "schedstat").write_text(line)
    assert seconds_waited(tmp_path) == pytest.approx(2.0)
    assert seconds_waited(tmp_path / "nowhere") is None
    if Path("/proc/self/task").is_dir():
        own = seconds_waited()
        assert own is None or own >= 0


def told(waits: list[float], threads: int = 2) -> list[str]:
    """What is said of a training whose threads wait so much, all together, between two looks."""
    now, waited = 0.0, 0.0
    cores = Cores(threads, lambda: waited, lambda: now)
    said: list[str] = []
    for more in waits:
        now, waited = now + EVERY, waited + more
        cores.look(said.append)
        cores.look(said.append)  # the next step, at once
    return said


def test_two_threads_beside_other_work_are_told_once():
    crowded = 1.5 * SHARE * 2 * EVERY
    (line,) = told([crowded] * (LOOKS + 3))
    assert "OMP_NUM_THREADS=1" in line and "2 threads" in line and f"{1.5 * SHARE:.0%}" in line
    assert told([crowded] * (LOOKS - 1)) == []  # something short, such as a compiler
    assert told([crowded, 0.0] * 4) == []


def test_a_quiet_machine_and_a_single_thread_are_told_nothing():
    assert told([0.9 * SHARE * 2 * EVERY] * 9) == told([0.0] * 9) == []
    assert told([EVERY] * 9, threads=1) == []
    unknown: list[str] = []
    cores = Cores(2, lambda: None, iter(range(0, 1000, 20)).__next__)
    for _ in range(9):
        cores.look(unknown.append)
    assert unknown == []
    assert not is_crowded(1.0, 0.0, 2)
