"""SIGTERM in eight phases: saved within ten seconds, at most one step lost, exit code 143, one line, no traceback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hldm import cli
from tests.torture import children, small
from tests.torture.trial import Trial

EACH = 5  # signals for each phase and stage
SECONDS = 10.0  # from the signal to the end of the process
DELAY_SECONDS = 0.03  # a signal comes at most so long after its phase began: about half a step
HERE = b"here\n"

# phase: (stages, module and name that is called when it begins, which call of it, overrides)
UNSAVED = (small.UNSAVED,)  # what is found afterwards was saved by the signal
PHASES: dict[str, tuple[tuple[str, ...], str, int, tuple[str, ...]]] = {
    "first step": (small.STAGES, "hldm.training.trainer.Trainer.step", 1, UNSAVED),
    "training": (small.STAGES, "hldm.training.trainer.Trainer.step", 7, UNSAVED),
    "accumulation": (
        small.STAGES,
        "hldm.training.trainer.nullcontext",  # within the last micro-batch of a step
        6,
        UNSAVED,
    ),
    "saving": (small.STAGES, "hldm.training.trainer.save_checkpoint", 5, ()),
    "sampling": (
        small.STAGES,
        "hldm.training.trainer.Trainer._sample",
        2,
        (*UNSAVED, "logging.sample_every=3"),
    ),
}


def torture(trial: Trial) -> None:
    text = small.write_text(trial.folder)
    straight = small.train_straight(trial.folder / "straight", text)
    slowest = 0.0
    for phase, (stages, target, call, overrides) in PHASES.items():
        if phase == "accumulation":  # the second micro-batch of the sixth step
            overrides = (*overrides, "training.accumulation=2")
        for stage in stages:
            for number in range(trial.count(EACH)):
                folder = small.start_folder(trial.folder / f"{stage}-{number}", stage, straight)
                work = small.train(folder, text, stage, *overrides)
                end = terminate_in(folder, target, call, work, delay(trial, number))
                slowest = max(slowest, end.seconds)
                wrong = end.wrong()
                wrong += check_saved(folder, stage, end.steps)
                trial.record(f"{phase} of {stage} {number}", wrong)
                shutil.rmtree(folder)
    prompt = ["--run", str(straight / "runs" / "small"), "--prompt", "And the", "--max-chars", "1000000"]
    for number in range(trial.count(EACH)):
        folder = trial.folder / f"generation-{number}"
        folder.mkdir()
        work = partial(cli.generate, prompt)
        end = terminate_in(folder, "hldm.generation.writer.Continuation.add", 5, work, delay(trial, number))
        slowest = max(slowest, end.seconds)
        wrong = end.wrong()
        if len(end.said.split("hldm: ")[0].encode()) <= len("And the") + 4:
            wrong.append(f"the four chunks written were not flushed: {end.said[:100]!r}")
        trial.record(f"generation {number}", wrong)
        shutil.rmtree(folder)
    for number in range(trial.count(EACH)):
        folder = small.start_folder(trial.folder / f"start-{number}", "autoencoder")
        end = terminate_at_start(folder, text, trial.draw.uniform(0.1, 4.0))
        slowest = max(slowest, end.seconds)
        # in its first tenth of a second the interpreter itself dies of the signal; a shell reports 143 as well
        trial.record(f"start-up {number}", end.wrong(lines=(0, 1)))
        shutil.rmtree(folder)
    trial.note = f"the slowest left after {slowest:.1f} s"


def delay(trial: Trial, number: int) -> float:
    """Every other signal comes just when its phase begins, the rest a little later."""
    return trial.draw.uniform(0, DELAY_SECONDS) if number % 2 else 0.0


class End:
    """How a process ended that was asked to."""

    def __init__(self, status: int, seconds: float, said: str, steps: int) -> None:
        """steps: optimizer steps that were complete when the last one began."""
        self.status, self.seconds, self.said, self.steps = status, seconds, said, steps

    def wrong(self, lines: tuple[int, ...] = (1,)) -> list[str]:
        errors = [line for line in self.said.splitlines() if line.startswith("hldm: ") or "\nhldm: " in line]
        wrong = []
        if self.status == children.HUNG or self.seconds > SECONDS:
            wrong.append(f"did not leave within {SECONDS:g} s")
        elif self.status != 128 + signal.SIGTERM:
            wrong.append(f"ended with {self.status} instead of 143: {self.said[-500:]!r}")
        if "Traceback" in self.said:
            wrong.append("left a traceback")
        if len(errors) not in lines:
            wrong.append(f"said {len(errors)} lines of what happened")
        return wrong


def terminate_in(folder: Path, target: str, call: int, work: Callable[[], int | None], delay: float) -> End:
    """Fork, send SIGTERM once the child has announced that it is in the phase, and wait for its end."""
    reader, writer = os.pipe()

    def announced() -> int | None:
        os.close(reader)
        announce(target, call, lambda: os.write(writer, HERE))
        announce_steps(writer)
        return work()

    log = folder / "log"
    child = children.fork(announced, log)
    os.close(writer)
    try:
        said = children.read_until(reader, HERE, 300)
        time.sleep(delay)
        began = time.monotonic()
        os.kill(child, signal.SIGTERM)
        status = children.wait(child, 2 * SECONDS)
        seconds = time.monotonic() - began
        said += children.read_until(reader, b"the end", 1)
    finally:
        os.close(reader)
    steps = [int(word) for word in said.replace(HERE, b"").split()]
    output = log.read_text(errors="replace")
    if HERE not in said:
        output += f"Traceback of the trial: the phase {target} was never reached"
    return End(status, seconds, output, max(steps, default=0))


def announce(target: str, call: int, tell: Callable[[], Any]) -> None:
    """In a child: have the `call`-th call of a function, or method, tell before it begins."""
    import importlib

    path, _, name = target.rpartition(".")
    try:
        owner: Any = importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, kind = path.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    real = getattr(owner, name)
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            tell()
        return real(*arguments, **options)

    setattr(owner, name, wrapped)


def announce_steps(writer: int) -> None:
    """In a child: tell at the beginning of each optimizer step how many are complete."""
    from hldm.training.trainer import Trainer

    real = Trainer.step

    def step(self: Trainer, progress: float) -> dict[str, float] | None:
        os.write(writer, b"%d\n" % self.totals.steps)
        return real(self, progress)

    Trainer.step = step  # type: ignore[method-assign]


def check_saved(folder: Path, stage: str, steps: int) -> list[str]:
    """At most one complete step is missing from the newest checkpoint."""
    wrong: list[str] = []
    step = small.newest_step(folder, stage, wrong)
    if step < max(1, steps - 1):
        wrong.append(f"{steps} steps were complete, the newest checkpoint is {step}")
    return wrong


def terminate_at_start(folder: Path, text: Path, delay: float) -> End:
    """SIGTERM to a process of its own while it imports, reads its texts, opens its folder."""
    command = [sys.executable, str(small.SCRIPTS["autoencoder"]), *small.arguments(text, "autoencoder")]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    time.sleep(delay)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(2 * SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = children.HUNG
    status = 128 - status if status < -1 else status
    return End(status, time.monotonic() - began, (folder / "log").read_text(errors="replace"), 0)
