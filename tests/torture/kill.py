"""kill -9 at random times of real trainings, each resumed: nothing acknowledged is lost, the end is bit-equal.

With checkpoint.every=1, the line that a step writes to metrics.jsonl acknowledges the save of the step before.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.torture import children, small
from tests.torture.trial import Trial

KILLS = 200  # for each stage
PROCESSES = 10  # of them, of processes started anew rather than forked
EARLY = 0.2  # share of the lives that may end before the first step: while reading, restoring, rewinding
EARLY_SECONDS = {True: 6.0, False: 0.3}  # a new process imports torch first, a fork has it
TRAINING_SECONDS = 0.6  # the others end at most so long after they began to train: about ten steps and saves


def torture(trial: Trial) -> None:
    text = small.write_text(trial.folder)
    straight = small.train_straight(trial.folder / "straight", text)
    inside = finished = 0
    for stage in small.STAGES:
        kills, processes = trial.count(KILLS), trial.count(PROCESSES)
        while kills > 0:
            folder = small.start_folder(trial.folder / f"{stage}-{kills}", stage, straight)
            acknowledged, life, well = 0, 0, True
            while well:
                log = folder / f"{life}.log"
                is_process = kills > 0 and processes > 0 and life > 0
                child = start(folder, text, stage, log, resume=life > 0, is_process=is_process)
                if kills > 0:
                    live(trial, log, is_process=is_process)
                    status = children.kill(child)
                else:
                    status = children.wait(child)
                wrong = check_resumed(log, acknowledged, resumes=life > 0)
                if status != 137:
                    finished += 1
                    ended = [f"ended with {status}: {last_line(log)}"] if status else []
                    trial.bad += [f"{folder.name}: {what}" for what in wrong + ended]
                    if not ended:
                        trial.bad += [
                            f"{folder.name}: {d}" for d in small.differences(folder, straight, stage)
                        ]
                    break
                life, kills, processes = life + 1, kills - 1, processes - is_process
                inside += bool(small.leftovers(folder, stage))
                lines = small.metrics(folder, stage)
                acknowledged = max(acknowledged, int(lines[-1]["step"]) - 1 if lines else 0)
                step = small.newest_step(folder, stage, wrong)
                if step < acknowledged:
                    wrong.append(f"step {acknowledged} was acknowledged, the newest checkpoint is {step}")
                well = trial.record(f"{folder.name} life {life}", wrong)
            shutil.rmtree(folder)
    trial.note = f"{inside} inside a save or delete; {finished} runs finished and compared"


def start(folder: Path, text: Path, stage: str, log: Path, *, resume: bool, is_process: bool) -> int:
    """Start a training by fork, or as a process of its own; returns the process's number."""
    if not is_process:
        return children.fork(small.train(folder, text, stage, resume=resume), log)
    command = [sys.executable, str(small.SCRIPTS[stage]), *small.arguments(text, stage, resume=resume)]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env=dict(os.environ))
    process.returncode = 0  # children.kill waits for it
    return process.pid


def live(trial: Trial, log: Path, *, is_process: bool) -> None:
    """Wait for a random time to die at."""
    if trial.draw.random() < EARLY:
        time.sleep(trial.draw.uniform(0, EARLY_SECONDS[is_process]))
        return
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (log.exists() and b"; a step reads " in log.read_bytes()):
        time.sleep(0.002)
    time.sleep(trial.draw.uniform(0, TRAINING_SECONDS))


def check_resumed(log: Path, acknowledged: int, *, resumes: bool) -> list[str]:
    """A life that came so far said where it goes on from: at what was acknowledged, or later."""
    said = re.search(r"^resuming .* at step (\d+)$", log.read_text(), re.M) if log.exists() else None
    if resumes and said and int(said[1]) < acknowledged:
        return [f"resumed at step {said[1]}, step {acknowledged} was acknowledged"]
    return []


def last_line(log: Path) -> str:
    return (log.read_text().strip().splitlines() or [""])[-1]
