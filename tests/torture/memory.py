"""Memory stays flat: resident bytes over 500 optimizer steps, and over 500 generated chunks."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median

from tests.torture import children, small
from tests.torture.trial import Trial

COUNT = 500
WARM_UP = 0.2  # share of the steps in which allocators and caches may still grow
GROWTH = 0.05
PAGE = os.sysconf("SC_PAGE_SIZE")


def torture(trial: Trial) -> None:
    text = small.write_text(trial.folder)
    straight = small.train_straight(trial.folder / "straight", text)
    count = max(60, trial.count(COUNT))
    notes = []
    for stage in small.STAGES:
        folder = small.start_folder(trial.folder / stage, stage, straight)
        steps = (f"training.{stage}.steps={count}", "checkpoint.every=50")
        work = watched_training(small.train(folder, text, stage, *steps))
        notes.append(judge(trial, f"{count} steps of {stage}", folder, work, count))
    for doc in ("through ends", "one row"):
        folder = trial.folder / doc
        folder.mkdir()
        rows = 1 if doc == "one row" else 4
        work = generation(straight / "runs" / "small" / "pipeline", rows, count)
        notes.append(judge(trial, f"{count} chunks in {rows} row(s)", folder, work, count))
    trial.note = "; ".join(notes)


def judge(
    trial: Trial, what: str, folder: Path, work: Callable[[Callable[[], None]], int | None], count: int
) -> str:
    """Run in a child that notes its memory `count` times; record it, and say how much it grew."""
    notes = folder / "resident"

    def noting() -> int | None:
        with open(notes, "wb", buffering=0) as file:
            return work(lambda: file.write(b"%d\n" % resident_bytes()) and None)

    status = children.run(noting, folder / "log")
    resident = [int(line) for line in notes.read_bytes().split()]
    if status or len(resident) < count:
        said = (folder / "log").read_text()[-300:]
        trial.record(what, [f"ended with {status} after {len(resident)} of {count}: {said}"])
        return ""
    tenth = len(resident) // 10
    warm = int(len(resident) * WARM_UP)
    before, after = median(resident[warm - tenth : warm]), median(resident[-tenth:])
    growth = after / before - 1
    trial.record(what, [f"memory grew by {growth:.1%}"] if growth > GROWTH else [])
    return f"{what} {growth:+.2%} of {before / 2**20:.0f} MB"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def watched_training(train: Callable[[], int]) -> Callable[[Callable[[], None]], int]:
    """A training that notes its memory at every step."""
    from hldm.training.trainer import Trainer

    real = Trainer.step

    def work(note: Callable[[], None]) -> int:
        def step(self: Trainer, progress: float) -> dict[str, float] | None:
            note()
            return real(self, progress)

        Trainer.step = step  # type: ignore[method-assign]
        return train()

    return work


def generation(pipeline: Path, rows: int, count: int) -> Callable[[Callable[[], None]], None]:
    """A generation that notes its memory at every chunk, carried through the ends of documents."""

    def work(note: Callable[[], None]) -> None:
        from hldm.generation.pipeline import read_pipeline
        from hldm.generation.writer import write_on

        parts = read_pipeline(pipeline)
        news = write_on(
            parts.autoencoder,
            parts.prior,
            [b"And the"] * rows,
            parts.settings,
            max_characters=64 * count,  # more than so many chunks hold
            through_ends=True,
        )
        for _ in islice(news, count):
            note()

    return work
