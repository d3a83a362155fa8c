"""How far a training is: a live bar on a terminal, a plain line every so often elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


BAR_WIDTH = 12  # columns of a terminal
# signs of life of what trains (hldm.model.vitals): those that a line of progress shows, and the others
SIGNS = {"prototypes": "{:.0f} prototypes", "rank": "rank {:.1f}"}
OTHER_SIGNS = {"weights_bits", "dimensions", "dead_dimensions", "largest_bin"}


def describe(metrics: dict[str, float]) -> str:
    """Bits per character by name, their sum first when there are several, the speed, and signs of life."""
    skip = {"learning_rate", "gradient_norm", "characters_per_second", "seconds"} | SIGNS.keys() | OTHER_SIGNS
    bits = {name: value for name, value in metrics.items() if name not in skip}
    # stage two trains the latents' terms of the bound alone
    of_what = "" if "decoder" in bits else " in latents alone"
    parts = [f"{sum(bits.values()):.3f} bits/char{of_what}"]
    if len(bits) > 1:
        parts.append("(" + " + ".join(f"{name} {value:.3f}" for name, value in bits.items()) + ")")
    parts.append(f"{metrics['characters_per_second']:,.0f} chars/s")
    parts += [form.format(metrics[name]) for name, form in SIGNS.items() if name in metrics]
    return " ".join(parts)


def clock(seconds: float) -> str:
    """65 -> 1:05."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def say_line(line: str) -> None:
    """Print; once nobody reads any more, such as `head`, go on in silence: a training is worth more."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Part(NamedTuple):
    """Which of the trainings that were asked for: stage 1 of 2."""

    number: int  # from 1
    of: int
    later_minutes: float | None  # of those that follow; None: some have no limit in minutes

    def __str__(self) -> str:
        return f"stage {self.number} of {self.of}"


ALONE = Part(1, 1, 0.0)


class Recent:
    """Bits per character, averaged over the steps since the last line of metrics."""

    def __init__(self) -> None:
        self.nats: dict[str, float] = {}
        self.characters = 0.0

    def add(self, nats: dict[str, float], characters: float) -> dict[str, float]:
        """Include a step; returns the averages so far."""
        self.characters += characters
        for name, value in nats.items():
            self.nats[name] = self.nats.get(name, 0.0) + value
        return {name: total / self.characters / math.log(2) for name, total in self.nats.items()}


class Progress:
    """Reports steps of one stage; rank 0's `say` prints, the others' says nothing."""

    def __init__(self, stage: str, say: Callable[[str], None], live: bool):
        """live: draw a bar if this is a terminal (the main process alone should)."""
        self.stage, self.say = stage, say
        self.live = live and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "")
        self.began: tuple[float, float] | None = None  # (time, progress) of the first report
        self.bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self.live:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            # of what does not fit, the end of the note is cut
            whole, rest = (
                Column(no_wrap=True, min_width=len(self.stage)),
                Column(no_wrap=True, overflow="ellipsis"),
            )
            bar = BarColumn(BAR_WIDTH, table_column=Column(no_wrap=True, min_width=BAR_WIDTH))
            note = TextColumn("{task.fields[note]}", table_column=rest)
            self.bar = Bar(TextColumn("{task.description}", table_column=whole), bar, note)
            self.bar.start()
            self.task = self.bar.add_task(self.stage, total=1.0, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, step: int, progress: float, metrics: dict[str, float], every: int) -> None:
        """Report a step. progress: share of the training done; metrics: see `describe`."""
        now = time.monotonic()
        if self.began is None:
            self.began = (now, progress)
        done = progress - self.began[1]
        left = (now - self.began[0]) / done * (1 - progress) if done > 0 else 0.0
        place, rest = f"step {step} {min(progress, 1.0):4.0%}", f"{clock(max(left, 0.0))} left"
        if self.bar is not None:
            self.bar.update(
                self.task, completed=min(progress, 1.0), note=f"{place} {rest} {describe(metrics)}"
            )
        elif step % every == 0:
            self.say(f"{self.stage}: {place} {describe(metrics)} {rest}")
