"""A kill or a full disk during a save costs nothing acknowledged."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hldm.runs.checkpoints import (
    CheckpointError,
    checkpoints_in,
    newest_checkpoint,
    save_checkpoint,
)
from tests.runs.saves import FILES, assert_holds, hidden, save
from tests.torture.disk import Disk

# A full disk


def test_whatever_call_the_disk_refuses_the_old_checkpoint_stands(tmp_path: Path) -> None:
    with Disk().watching() as disk:
        save(tmp_path, 1)
        disk.calls.clear()
        save(tmp_path, 2)
        sequence = disk.calls.copy()
        assert set(sequence) == {"fsync", "rename", "mkdir", "save_file", "open"}
        assert sequence.count("fsync") == len(FILES) + 2  # both folders, the outer one after the rename
        assert sequence[-3:] == ["fsync", "rename", "fsync"]
        for refused, call in enumerate(sequence, start=1):
            shutil.rmtree(checkpoints_in(tmp_path)[2])
            disk.calls.clear()
            disk.fatal = refused
            with pytest.raises(
                CheckpointError, match=r"step-000000002 could not be saved: No space left .*free"
            ):
                save(tmp_path, 2, keep=1)
            disk.fatal = 0
            assert hidden(tmp_path) == [], call
            assert_holds(checkpoints_in(tmp_path)[1], 1)
            save(tmp_path, 2)


@pytest.mark.parametrize("too_long", ["model.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("limit_bytes", [0, 3000])
def test_a_file_that_really_cannot_grow_costs_nothing(
    tmp_path: Path, too_long: str, limit_bytes: int
) -> None:
    many = 40 if too_long == "MANIFEST.json" else 1  # small files, but a long list of them
    tensors = {f"model{i}": {"w": torch.ones(9000 if "model" in too_long else 1)} for i in range(many)}
    state = {"notes": "x" * 9000 if too_long == "state.json" else ""}
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(CheckpointError, match="step-000000002 could not be saved: .*[Ff]ile too large"):
            save_checkpoint(tmp_path, 2, tensors, state, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(checkpoints_in(tmp_path)) == [1] and hidden(tmp_path) == []
    assert_holds(checkpoints_in(tmp_path)[1], 1)


# kill -9

SAVER = """
import os, signal, sys
import torch
from hldm.runs.checkpoints import save_checkpoint

def save(step):
    weight = torch.full((20_000,), step)
    save_checkpoint(sys.argv[1], step, {"model": {"w": weight}}, {"step": step}, keep=1)
    os.write(1, b"saved %d\\n" % step)

def die_before(name, fatal, calls=[0]):
    real = getattr(os, name)
    def call(*arguments, **options):
        calls[0] += 1
        if calls[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, call)

for line in sys.stdin:  # every order is carried out by a fork of its own, as importing torch takes seconds
    step, fatal = map(int, line.split())
    child = os.fork()
    if child == 0 and fatal:
        save(step + 1)
        for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
            die_before(name, fatal)
        save(step + 2)
        os._exit(0)
    while child == 0:
        save(step := step + 1)
    os.write(1, b"child %d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"gone 0\\n")
"""

Order = Callable[[int, int], Iterator[tuple[str, int]]]


@pytest.fixture
def order(tmp_path: Path) -> Iterator[Order]:
    """Have a process save the steps after one given: for ever, or two, dying at a call within the second."""
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert saver.stdin and saver.stdout
    stdin, stdout = saver.stdin, saver.stdout

    def answers(step: int, fatal: int) -> Iterator[tuple[str, int]]:
        stdin.write(f"{step} {fatal}\n")
        stdin.flush()
        while (answer := stdout.readline().split())[0] != "gone":
            yield answer[0], int(answer[1])

    yield answers
    stdin.close()
    saver.wait(timeout=20)
    stdout.close()


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, which must be whole, and so must any other."""
    checkpoint = newest_checkpoint(folder, pytest.fail)
    if checkpoint is None:
        return 0
    assert checkpoint.state == {"step": checkpoint.step}
    assert (checkpoint.tensors["model"]["w"] == checkpoint.step).all()
    return checkpoint.step


def test_kill_9_at_random_times_loses_nothing_acknowledged(tmp_path: Path, order: Order) -> None:
    draw = random.Random(0)
    step = acknowledged = kills = 0
    while kills < 20 or step <= 20:  # on a busy machine many a life ends before its first save
        kills += 1
        for word, number in order(step, 0):
            if word == "child":
                time.sleep(draw.uniform(0, 0.15))
                os.kill(number, signal.SIGKILL)
            else:
                acknowledged = number
        step = newest_step(tmp_path)
        assert step >= acknowledged


def test_kill_9_before_each_call_of_a_save_loses_nothing_acknowledged(tmp_path: Path, order: Order) -> None:
    steps = []
    for fatal in range(1, 100):
        saved = [number for word, number in order(0, fatal) if word == "saved"]
        steps.append(newest_step(tmp_path))
        if 2 in saved:  # it lived to the end: the calls are exhausted
            break
        save(tmp_path, 3, keep=1)
        assert hidden(tmp_path) == []
        shutil.rmtree(tmp_path / "checkpoints")
    assert steps == sorted(steps) and steps.count(1) > 5 and steps.count(2) > 5
