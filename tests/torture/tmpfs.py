"""A disk that another program fills while a training runs; it then goes on when there is room again."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from tests.torture import children, small
from tests.torture.trial import Skipped, Trial


def torture(trial: Trial) -> None:
    text = small.write_text(trial.folder)
    mounted = trial.folder / "mounted"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "none", str(mounted)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        raise Skipped("mounting a tmpfs needs root")
    try:
        straight = small.train_straight(trial.folder / "straight", text, ("autoencoder",))
        log = trial.folder / "full.log"
        child = children.fork(small.train(mounted, text, "autoencoder"), log)
        while len(small.metrics(mounted, "autoencoder")) < 3:
            time.sleep(0.01)
        filler = fill(mounted)
        status = children.wait(child)
        said = log.read_text()
        errors = [line for line in said.splitlines() if line.startswith("hldm: ")]
        wrong: list[str] = []
        if status != 2 or "Traceback" in said:
            wrong.append(f"a full disk ended the run with {status}: {said[-300:]}")
        if len(errors) != 1 or "No space left" not in errors[0]:
            wrong.append(f"said {errors}")
        if left := small.leftovers(mounted, "autoencoder"):
            wrong.append(f"left {left}")
        step = small.newest_step(mounted, "autoencoder", wrong)
        logged = int(small.metrics(mounted, "autoencoder")[-1]["step"])
        if step < logged - 1 or step < 2:
            wrong.append(f"step {logged} was logged, the newest checkpoint is {step}")
        trial.record("disk full while training", wrong)

        filler.unlink()
        work = small.train(mounted, text, "autoencoder", resume=True)
        status = children.run(work, log)
        wrong = [f"ended with {status}: {log.read_text()[-300:]}"] if status else []
        trial.record("room again", wrong or small.differences(mounted, straight, "autoencoder"))
        trial.note = f"full at step {step + 1}"
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def fill(folder: Path) -> Path:
    """Take all the room there is, to the last page; what is given back meanwhile, too."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        refused = 0
        while refused < 20:
            try:
                file.write(bytes(4096))
                refused = 0
            except OSError:
                refused += 1
                time.sleep(0.02)
    return path
