"""A full disk (ENOSPC) and a broken one (EIO) at every system call of one save: one clear error, nothing lost."""

from __future__ import annotations

import shutil

from tests.torture.strace import crash_points, save_under, temporaries, whole_step
from tests.torture.trial import Trial


def torture(trial: Trial) -> None:
    points = [(call, k, name) for call, k in crash_points(trial.folder) for name in ("ENOSPC", "EIO")]
    refused = 0
    for call, number, name in trial.sample(points):
        folder = trial.folder / f"{call}-{number}-{name}"
        status, said = save_under(folder, call, number, f"error={name}")
        wrong: list[str] = []
        step = whole_step(folder, wrong)
        errors = [line for line in said.splitlines() if line.startswith("hldm: ")]
        refused += status == 2
        if "Traceback" in said or status not in (0, 2):
            wrong.append(f"ended with {status}: {said[-300:]}")
        if status == 2 and len(errors) != 1:
            wrong.append(f"said {len(errors)} errors instead of one: {said}")
        if step not in ((2,) if status == 0 or "saved 2" in said else (1, 2)):
            wrong.append(f"ended with {status}, the newest checkpoint is {step}")
        # a delete that failed is only said, once the save is done; the next save tries it again
        if status and temporaries(folder):
            wrong.append(f"left {temporaries(folder)}")
        trial.record(f"{name} at {call} {number}", wrong)
        shutil.rmtree(folder)
    trial.note = f"{refused} saves refused, the others done all the same"
