"""No rank outlives the others, no process its launcher; what was saved is gone on from to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from hldm import cli
from hldm.runs.checkpoints import newest_checkpoint
from tests.training.test_trainer import assert_same, losses, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


# train_autoencoder.py with a rank that can be watched and spoiled: it writes its number and step, stops
# itself by a signal, or gets a nan, at a step given by the environment.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from hldm import cli
from hldm.training import stage
from hldm.training.trainer import Trainer

stage.TIMEOUT_S = float(os.environ.get("TIMEOUT", stage.TIMEOUT_S))
rank = os.environ.get("RANK", "0")
step = Trainer.step

def watched(self, progress):
    Path(f"at-{rank}.new").write_text(f"{os.getpid()} {self.totals.steps}")
    os.replace(f"at-{rank}.new", f"at-{rank}")
    if os.environ.get("STOP") == f"{rank}:{self.totals.steps}":
        os.kill(os.getpid(), signal.SIGTERM)
    if os.environ.get("NAN") == f"{rank}:{self.totals.steps}":
        forward = self.objective.forward
        def spoiled(*arguments):
            out = forward(*arguments)
            return out._replace(loss=out.loss * float("nan"))
        self.objective.forward = spoiled
    time.sleep(float(os.environ.get("PAUSE", "0")))
    return step(self, progress)

Trainer.step = watched
sys.exit(cli.train_autoencoder(sys.argv[1:]))
"""


LAUNCHED: list[Launched] = []


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A test that fails half-way leaves no process."""
    yield
    while LAUNCHED:
        launcher = LAUNCHED.pop().process
        if launcher.poll() is None:
            for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                process.kill()


class Launched:
    """A training below `accelerate launch`, in `folder`."""

    def __init__(self, folder: Path, processes: int, *arguments: str, **environment: str):
        (folder / "watched.py").write_text(PROGRAM)
        for old in folder.glob("at-*"):
            old.unlink()
        self.folder = folder
        LAUNCHED.append(self)
        many = ["--multi_gpu", "--main_process_port", str(29_500 + os.getpid() % 1000)]
        launch = [*(many if processes > 1 else []), "--num_processes", str(processes), "watched.py"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *launch, *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rank(self, rank: int, steps: int) -> int:
        """The process number of a rank, once it has done so many steps."""
        deadline = time.monotonic() + 200
        at = self.folder / f"at-{rank}"
        while not at.exists() or int(at.read_text().split()[1]) < steps:
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        return int(at.read_text().split()[0])

    def end(self) -> tuple[int, list[str]]:
        """Exit code of the launcher and the lines that hldm wrote to standard error."""
        _, error = self.process.communicate(timeout=200)
        assert f'File "{ROOT}/hldm' not in error  # tracebacks are the launcher's own
        return self.process.returncode, [line for line in error.splitlines() if line.startswith("hldm:")]


def seconds_until_gone(process: int) -> float:
    """Wait for a process that is no child of ours to end."""
    began = time.monotonic()
    while time.monotonic() - began < 90:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or while it was read
            return time.monotonic() - began
        if state == "Z":
            return time.monotonic() - began
        time.sleep(0.05)
    pytest.fail(f"process {process} is still there")


@pytest.fixture
def arguments(small_overrides: list[str]) -> list[str]:
    return ["--config", str(ROOT / "configs/tiny.yaml"), "--name", "small", *small_overrides]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_training_ends_saved_when_its_launcher_does(number, arguments, tmp_path):
    launched = Launched(tmp_path, 1, *arguments, "training.autoencoder.steps=100000", PAUSE="0.05")
    worker = launched.rank(0, steps=2)
    launched.process.send_signal(number)
    assert seconds_until_gone(worker) < 15
    _, said = launched.end()
    assert len(said) == 1 and said[0].startswith("hldm: stopped by SIGTERM; saved ")
    done = int((tmp_path / "at-0").read_text().split()[1])
    saved = newest_checkpoint(tmp_path / "runs/small/autoencoder")
    assert saved is not None and done <= saved.step <= done + 1


def test_a_rank_that_hangs_is_named_and_ends_the_run(arguments, tmp_path):
    limit = ["training.autoencoder.steps=100000", "checkpoint.every=2"]
    launched = Launched(tmp_path, 2, *arguments, *limit, PAUSE="0.05", TIMEOUT="6")
    others = [launched.rank(rank, steps=3) for rank in (0, 1)]
    os.kill(others[1], signal.SIGSTOP)
    assert seconds_until_gone(others[0]) < 6 + 5
    code, said = launched.end()
    assert code != 0 and len(said) == 1
    assert said[0].startswith("hldm: rank 1 of 2 has died or hangs (no answer for 6 seconds): go on")
    assert seconds_until_gone(others[1]) < 1


def test_ranks_stopped_and_killed_go_on_to_the_same_weights(arguments, tmp_path):
    steps = [*arguments, "training.autoencoder.steps=30", "checkpoint.every=1"]
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    assert Launched(tmp_path / "straight", 2, *steps).end() == (0, [])
    home = tmp_path / "broken"
    stage = home / "runs/small/autoencoder"
    # a signal to rank 1 alone: both save the same step and leave
    code, said = Launched(home, 2, *steps, STOP="1:6").end()
    assert code != 0 and said == [
        "hldm: stopped by SIGTERM; saved runs/small/autoencoder/checkpoints/step-000000007: go on with --resume"
    ]
    assert newest_checkpoint(stage).step == 7
    # rank 1 killed: all gone
    launched = Launched(home, 2, *steps, "--resume", PAUSE="0.05")
    ranks = [launched.rank(rank, steps=12) for rank in (0, 1)]
    os.kill(ranks[1], signal.SIGKILL)
    assert max(seconds_until_gone(rank) for rank in ranks) < 30
    assert launched.end()[0] != 0
    assert Launched(home, 2, *steps, "--resume").end() == (0, [])
    assert_same(weights(tmp_path / "straight/runs/small/autoencoder"), weights(stage))


def test_a_nan_in_one_rank_ends_both_in_the_same_way(arguments, tmp_path):
    launched = Launched(tmp_path, 2, *arguments, "checkpoint.every=1", NAN="1:4")
    code, said = launched.end()
    assert code != 0 and len(said) == 1 and "4 steps in a row were not finite" in said[0]
    stage = tmp_path / "runs/small/autoencoder"
    assert newest_checkpoint(stage).step == 4
    record = json.loads((stage / "post-mortem.json").read_text())
    assert [skipped["step"] for skipped in record["skipped_steps"]] == [5, 6, 7, 8]


def test_two_ranks_then_one_then_two_train_what_one_does(arguments, tmp_path, monkeypatch):
    plain = [*arguments, "training.autoencoder.steps=30"]
    for name in ("one", "mixed"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert cli.train_autoencoder(plain) == 0
    home = tmp_path / "mixed"
    assert Launched(home, 2, *plain, STOP="0:6").end()[0] != 0
    (home / "watched.py").write_text(PROGRAM)
    alone = subprocess.run(
        [sys.executable, "watched.py", *plain, "--resume"],
        cwd=home, env={**os.environ, "PYTHONPATH": str(ROOT), "STOP": "0:15"}, timeout=200,
    )  # fmt: skip
    assert alone.returncode == 143
    assert Launched(home, 2, *plain, "--resume").end() == (0, [])
    runs = [tmp_path / name / "runs/small/autoencoder" for name in ("one", "mixed")]
    assert losses(runs[0], "learning_rate") == losses(runs[1], "learning_rate")
    found = [losses(run, "decoder", "latent") for run in runs]
    assert len(found[0]) == 30 and found[0] == pytest.approx(found[1], abs=1e-4)
