"""Stopped and resumed equals trained, to the bit: where, in which stage, on one rank and on two.

Batches are pure functions of (seed, step) and made where they are used: there are no data workers whose
number could change anything. Ranks are forked with the environment that torchrun sets; two cases go
through `accelerate launch` itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hldm.chunking.chunker import make_chunker
from hldm.config import load_config
from hldm.sources.corpora import load_corpus
from hldm.text.windows import Windows
from tests.conftest import SMALL
from tests.torture import children, small
from tests.torture.trial import Trial

APART = 1e-4  # bits per character between one rank and two: sums in another order


class Case(NamedTuple):
    """A training, and the points at which it is killed: (step, micro-batches of it already done)."""

    stage: str
    ranks: int
    accumulation: int
    where: str
    kills: tuple[tuple[int, int], ...]

    @property
    def overrides(self) -> tuple[str, ...]:
        return (f"training.accumulation={self.accumulation}",)


def torture(trial: Trial) -> None:
    text = small.write_text(trial.folder)
    epoch = windows(text).windows_per_epoch
    assert 2 * epoch + 2 < small.STEPS, "the runs must reach into their third epoch"
    places = {
        "mid-epoch": ((epoch // 2, 0),),
        "epoch end": ((epoch, 0),),
        "epoch two": ((epoch + epoch // 2, 0),),
        "three times in an epoch": ((epoch + 2, 0), (epoch + 5, 0), (epoch + 8, 0)),
    }
    cases = [
        Case(*options, *place)
        for options in product(small.STAGES, (1, 2), (1, 2))
        for place in places.items()
    ]
    cases += [
        Case(stage, ranks, 2, "inside an accumulation", ((epoch // 2, 1),))
        for stage, ranks in product(small.STAGES, (1, 2))
    ]
    trained = small.train_straight(trial.folder / "trained", text)  # the autoencoder of every second stage
    chosen = trial.sample(cases)
    straights: dict[tuple[str, int, int], Path] = {}
    for number, case in enumerate(chosen):
        key = (case.stage, case.ranks, case.accumulation)
        if key not in straights:
            folder = small.start_folder(trial.folder / "-".join(map(str, key)), case.stage, trained)
            straights[key] = folder
            if wrong := finish(folder, text, case, resume=False):
                raise RuntimeError(f"the uninterrupted run of {case} {'; '.join(wrong)}")
        folder = small.start_folder(trial.folder / str(number), case.stage, trained)
        wrong = []
        for life, (step, part) in enumerate(case.kills):
            status = train_ranks(folder, text, case, resume=life > 0, kill_at=(step, part))
            if status != [137] * case.ranks:
                wrong.append(f"life {life} ended with {status}")
        wrong += finish(folder, text, case, resume=True)
        wrong += small.differences(folder, straights[key], case.stage)
        wrong += check_samples(folder, straights[key], text, epoch)
        trial.record(
            f"{case.where}, {case.stage}, {case.ranks} rank(s), accumulation {case.accumulation}", wrong
        )
        shutil.rmtree(folder)
    trial.record("world size 2, then 1, then 2", two_one_two(trial, text, trained, epoch))
    launches = trial.count(2)
    for stage in small.STAGES[:launches]:
        trial.record(f"accelerate launch of {stage}", launch(trial, text, trained, stage))
    trial.note = f"{len(chosen)} of {len(cases)} places; {launches} through accelerate launch"


def windows(text: Path) -> Windows:
    """The training windows of these runs."""
    overrides = [*SMALL, f"data.path={text}", 'data.separator="\\n\\n"']
    config = load_config([small.ROOT / "configs/tiny.yaml"], overrides)
    chunker = make_chunker(config.chunking)
    corpus = load_corpus(config.data, "train")
    return Windows(corpus, chunker, lanes=config.data.lanes, window_bytes=config.data.window_bytes)


def train_ranks(
    folder: Path,
    text: Path,
    case: Case,
    *overrides: str,
    resume: bool,
    kill_at: tuple[int, int] | None = None,
) -> list[int]:
    """Fork a process a rank; returns their statuses. Each writes the chunks it reads to samples-<rank>."""
    work = small.train(folder, text, case.stage, *case.overrides, *overrides, resume=resume)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(case.ranks)}
    ranks = []
    for rank in range(case.ranks):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if case.ranks > 1 else {}
        noting = noting_samples(work, folder / f"samples-{rank}", case.accumulation, kill_at)
        ranks.append(children.fork(noting, folder / f"{rank}.log", own))
    return [children.wait(rank, 600) for rank in ranks]


def finish(folder: Path, text: Path, case: Case, *overrides: str, resume: bool) -> list[str]:
    """Train to the end; what went wrong."""
    statuses = train_ranks(folder, text, case, small.UNSAVED, *overrides, resume=resume)
    said = (folder / "0.log").read_text()
    if any(statuses):
        return [f"ended with {statuses}: {said[-500:]}"]
    processes = re.findall(r"; (\d+) process(?:es)? on ", said)[-1:]
    return [] if processes == [str(case.ranks)] else [f"ran as {processes} processes"]


def noting_samples(
    work: Callable[[], int], path: Path, parts: int, kill_at: tuple[int, int] | None
) -> Callable[[], int]:
    """`work`, noting step, first row and chunks of every batch; killed before a given micro-batch of a step."""
    real = Windows.batch

    def noting() -> int:
        with open(path, "a", buffering=1) as file:
            part = 0

            def batch(self: Windows, step: int, first_row: int = 0, rows: int | None = None):  # noqa: ANN202
                nonlocal part
                if not self.shuffle:  # of a validation
                    return real(self, step, first_row, rows)
                if (step, part % parts) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                part += 1
                found = real(self, step, first_row, rows)
                chunks = found.chunk_index[found.chunk_index >= 0].tolist()
                file.write(json.dumps([step, first_row, chunks]) + "\n")
                return found

            Windows.batch = batch  # type: ignore[method-assign]
            return work()

    return noting


def check_samples(folder: Path, straight: Path, text: Path, epoch: int) -> list[str]:
    """All lives together read what the uninterrupted run read; in its first epoch every chunk once."""
    lives, whole = samples(folder), samples(straight)
    # a step that a kill cut short is done again: its first micro-batches are then read twice, and count once
    wrong = [] if lives == whole else ["the samples of all lives are not those of the uninterrupted run"]
    chunks = sorted(chunk for (step, _), found in lives.items() if step < epoch for chunk in found)
    if chunks != list(range(windows(text).chunks)):
        wrong.append("the first epoch does not hold every chunk once")
    return wrong


def samples(folder: Path) -> dict[tuple[int, int], list[int]]:
    """(step, first row) -> chunks read, over all ranks and lives; read twice differently they are [-1]."""
    found: dict[tuple[int, int], list[int]] = {}
    for path in folder.glob("samples-*"):
        for line in path.read_text().splitlines():
            step, row, chunks = json.loads(line)
            if found.setdefault((step, row), chunks) != chunks:
                found[step, row] = [-1]
    return found


def two_one_two(trial: Trial, text: Path, trained: Path, epoch: int) -> list[str]:
    """A run of two ranks, then one, then two, has the losses of one rank throughout."""
    one = Case("autoencoder", 1, 1, "", ())
    two = one._replace(ranks=2)
    straight = small.start_folder(trial.folder / "one", "autoencoder")
    mixed = small.start_folder(trial.folder / "mixed", "autoencoder")
    wrong = finish(straight, text, one, resume=False)
    train_ranks(mixed, text, two, resume=False, kill_at=(10, 0))
    train_ranks(mixed, text, one, resume=True, kill_at=(epoch + 5, 0))
    wrong += finish(mixed, text, two, resume=True)
    losses = [
        np.array([[line["decoder"], line["latent"]] for line in small.metrics(folder, "autoencoder", False)])
        for folder in (straight, mixed)
    ]
    if losses[0].shape != losses[1].shape:
        return [*wrong, f"{len(losses[1])} steps were logged instead of {len(losses[0])}"]
    apart = float(np.abs(losses[0] - losses[1]).max())
    return wrong if apart <= APART else [*wrong, f"losses are {apart:g} bits per character apart"]


def launch(trial: Trial, text: Path, trained: Path, stage: str) -> list[str]:
    """The same by `accelerate launch`: all processes killed after some saves, then resumed to the end."""
    straight = small.start_folder(trial.folder / f"launch-{stage}-straight", stage, trained)
    case = Case(stage, 2, 1, "", ())
    wrong = finish(straight, text, case, resume=False)
    folder = small.start_folder(trial.folder / f"launch-{stage}", stage, trained)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    saved = small.stage_folder(folder, stage) / "checkpoints"
    for resume in (False, True):
        port = ["--main_process_port", str(free_port()), str(small.SCRIPTS[stage])]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [*command, *port, *small.arguments(text, stage, *case.overrides, resume=resume)],
                cwd=folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        if resume:
            if code := process.wait(900):
                wrong.append(f"ended with {code}: {(folder / 'log').read_text()[-500:]}")
            break
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline and not any(saved.glob("step-*[5-9]")):
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not 0 < small.newest_step(folder, stage, wrong) < small.STEPS:
            wrong.append("was not killed in the middle")
    if "2 processes on cpu" not in (folder / "log").read_text():
        wrong.append("did not run as two processes")
    return wrong + small.differences(folder, straight, stage)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
