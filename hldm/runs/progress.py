"""How far a training is: two lines that change in place on a terminal, a plain line every so often elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.live import Live


QUIET = 20.0  # seconds without a line, at most, however few steps they hold
REDRAWN = 0.1  # seconds between two pictures of the live display, at least
MOST_POINTS = 256  # of a curve that are kept; beyond, neighbours are averaged
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
# signs of life of what trains (hldm.model.vitals): those that a line of progress shows, and the others
SIGNS = {
    "prototypes": "prototypes {:.0f}",
    "distance": "distance {:.3f}",
    "rank": "rank {:.1f}",
    "least_deviation": "deviation {:.2f}",
    "mean_cosine": "cosine {:.2f}",
    "r2_beyond_length": "R2 {:.2f}",
    "shuffle_gap": "gap {:.2f}",
}
OTHER_SIGNS = {"weights_bits", "dimensions", "dead_dimensions", "largest_bin", "r2", "untrained_rank"} | {
    f"{whose}_{sign}"
    for whose in ("predicted", "target")
    for sign in ("rank", "least_deviation", "mean_cosine")
}
UNTRAINED = " (before it has learnt anything)"  # of the first step
END_TERM = (
    "the end term, how far latents under the strongest noise are from pure noise, near 0 as it should be"
)
# what the names on a line of progress mean: each is explained once, when it is shown first
LEGEND = {
    "bits": "bits/char: bits that a character of the training text costs, mean of the last steps, lower is better",
    "alone": "bits/char in latents alone: those that a character of the training text costs for its latents, all that "
    "this stage trains, lower is better",
    "validation": "validation: bits/char on 8,000 bytes of held-out text at most",
    "decoder": "decoder: its share for the bytes, given the latents",
    "latent": "latent: its share for the latents, given the text before",
    "end": f"end: {END_TERM}",
    "training": "latents in training: their share on the training text, all that this stage trains",
    "prototypes": "prototypes: typical latents that are in use (1: the mixture has collapsed)",
    "distance": "distance: from predicted to true vectors",
    "rank": "rank: independent directions in which latents vary",
    "least_deviation": "deviation: of the vectors' least varying number, as a share of their size",
    "mean_cosine": "cosine: between the vectors of two chunks, on average (1: all are alike)",
    "r2_beyond_length": "R2: of predictions, beyond what a chunk's length tells",
    "shuffle_gap": "gap: cosine with the right target less that with another",
}


def bits_of(metrics: dict[str, float]) -> dict[str, float]:
    """Of a step's metrics, those that are bits a character."""
    skip = {"learning_rate", "gradient_norm", "characters_per_second", "seconds"} | SIGNS.keys() | OTHER_SIGNS
    return {name: value for name, value in metrics.items() if name not in skip}


def describe(
    metrics: dict[str, float], validation: dict[str, float] | None = None, of_step: int | None = None
) -> str:
    """Bits per character by name, their sum first when there are several, the speed, and signs of life.

    validation: the last one's bound and terms, and the bits of answers, if there was one; stage two, which trains the
    latents' terms alone, has its total from there. An encoder that is trained on latents alone writes no bytes and has
    no bits. of_step: after which it was made, if that is not this one
    """
    bits = bits_of(metrics)
    made = "" if of_step is None else f" (step {of_step})"
    total = f"{sum(bits.values()):.3f}"
    of_what = " in latents alone" if "latent" in bits and "decoder" not in bits else ""
    parts = [f"{total} bits/char{of_what}"] if bits else []
    if len(bits) > 1:
        parts.append(_terms(bits))
    if validation is not None:
        if "decoder" in bits:
            parts.append(f"validation{made} {validation['bound']:.3f}")
        else:
            terms = {name: value for name, value in validation.items() if name not in ("bound", "answer")}
            parts = [
                f"validation{made} {validation['bound']:.3f} bits/char {_terms(terms)} latents in training {total}"
            ]
        if "answer" in validation:
            parts.append(f"answers {validation['answer']:.3f}")
    parts.append(f"{metrics['characters_per_second']:,.0f} chars/s")
    parts += [form.format(metrics[name]) for name, form in SIGNS.items() if name in metrics]
    return " ".join(parts)


def names_shown(metrics: dict[str, float], validation: dict[str, float] | None = None) -> set[str]:
    """Those names of LEGEND that `describe` shows of the same."""
    bits = bits_of(metrics)
    named = (set(bits) if len(bits) > 1 else set()) | (metrics.keys() & SIGNS.keys())
    if validation is not None:
        named |= {"validation"}
    if "latent" in bits and "decoder" not in bits:
        return named | ({"alone"} if validation is None else {"training", *validation})
    return named | ({"bits"} if bits else set())


def _terms(bits: dict[str, float]) -> str:
    return "(" + " + ".join(f"{name} {value:.3f}" for name, value in bits.items()) + ")"


def in_minutes(minutes: float) -> str:
    """0.34 -> 20 seconds, 2.7 -> 2.7 minutes."""
    seconds = round(60 * minutes)
    if seconds < 60:
        return f"{seconds} second{'s' * (seconds != 1)}"
    return "1 minute" if f"{minutes:.3g}" == "1" else f"{minutes:.3g} minutes"


def clock(seconds: float) -> str:
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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


class Curve:
    """A loss over the steps of a training, at most MOST_POINTS of it, evenly."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self._each = 1  # steps that a point stands for
        self._open: list[float] = []

    def add(self, loss: float) -> None:
        """Include a step."""
        self._open.append(loss)
        if len(self._open) == self._each:
            self.points.append(sum(self._open) / self._each)
            self._open = []
        if len(self.points) == MOST_POINTS:
            self.points = _binned(self.points, MOST_POINTS // 2)
            self._each *= 2

    def drawn(self, columns: int, bars: str = BARS) -> str:
        """As wide as that at most, a bar a column; a fall at the start is cut, or what follows would look flat."""
        finite = [loss for loss in self.points if math.isfinite(loss)]
        if columns < 1 or not finite:
            return ""
        values = _binned(finite, min(columns, len(finite)))
        least, most = min(values), sorted(values)[(3 * len(values) - 1) // 4]
        span = most - least or 1.0
        return "".join(bars[min(max(int((v - least) / span * len(bars)), 0), len(bars) - 1)] for v in values)


def _binned(values: Sequence[float], bins: int) -> list[float]:
    """Means of neighbours, in so many bins of nearly equal size."""
    edges = [round(place * len(values) / bins) for place in range(bins + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


class Picture(NamedTuple):
    """What the live display shows."""

    run: str
    stage: str  # which of how many, and its name
    progress: float
    left: float | None  # seconds of the stage; None: not known yet
    in_all: float | None  # seconds of what follows, too
    step: int
    bits: str
    validation: float | None
    speed: float  # characters a second
    curve: Curve

    def lines(self, columns: int, plain: bool = False) -> tuple[str, str]:
        """Two lines of at most so many columns: where the training is; what it has learnt.

        plain: nothing but ASCII
        """
        full, empty, dots, bars = ("#", "-", "..", ASCII_BARS) if plain else ("━", "╌", "…", BARS)
        done = f"{math.floor(100 * self.progress):3d}%"
        times = [] if self.left is None else [f"{clock(self.left)} left"]
        if self.in_all is not None and self.left is not None and self.in_all > self.left:
            times.append(f"{clock(self.in_all)} in all")
        end = f" {done} {', '.join(times)}".rstrip()
        begin = f"{self.run} {self.stage} "
        room = columns - len(begin) - len(end)
        if room < 4:  # no bar; and what does not fit of the name is cut
            most = columns - len(end)
            begin = begin.rstrip()
            first = (begin if len(begin) <= most else begin[: max(most - len(dots), 0)] + dots) + end
        else:
            filled = round(self.progress * room)
            first = begin + full * filled + empty * (room - filled) + end
        parts = [f"step {self.step:,}", self.bits]
        parts += [] if self.validation is None else [f"validation {self.validation:.3f}"]
        parts.append(f"{self.speed:,.0f} chars/s")
        second = ""
        for part in parts:  # the most important first
            joined = f"{second}  {part}" if second else part
            if len(joined) > columns:
                break
            second = joined
        curve = self.curve.drawn(columns - len(second) - 2, bars)
        return first[:columns], f"{second}  {curve}" if curve else second


class Progress:
    """Reports steps of one stage; rank 0's `say` prints, the others' says nothing."""

    def __init__(self, folder: Path, part: Part, say: Callable[[str], None], live: bool):
        """folder: runs/<run>/<stage>;  live: draw in place if this is a terminal (the main process alone should)."""
        self.run, self.stage = folder.parent.name, folder.name
        self.part, self.say = part, say
        is_terminal = sys.stdout is not None and sys.stdout.isatty()
        self.live = live and is_terminal and os.environ.get("TERM", "dumb") not in ("dumb", "")
        self.began: tuple[float, float] | None = None  # (time, progress) of the first report
        self.validation: dict[str, float] | None = None
        self.curve = Curve()
        self.explained: set[str] = set()  # names of LEGEND
        self.said_at = time.monotonic()  # when the last line was printed
        self.validated_at = 0  # the step
        self.is_fresh = False  # the last validation has not been printed yet
        self.distance = math.nan  # the last one that was measured, where there are no bits
        self.display: Live | None = None
        self.picture: Picture | None = None
        self.drawn = -math.inf  # when the display was drawn last

    def __enter__(self) -> Progress:
        if self.live:
            from rich.live import Live

            # drawn by this thread alone: a signal finds nothing half written
            self.display = Live(auto_refresh=False, vertical_overflow="crop")
            self.display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.display is not None:
            self._draw()
            self.display.stop()

    def validated(self, found: dict[str, float], step: int) -> None:
        """Report a validation after a step: its bound and terms, bits a character.

        What an untrained model costs is not shown; stage two begins where stage one ended.
        """
        if step or self.stage == "prior":
            self.validation, self.validated_at, self.is_fresh = found, step, True

    def _explain(self, names: set[str]) -> None:
        """Say what names mean that have not been explained yet, in one line."""
        new = [told for name, told in LEGEND.items() if name in names - self.explained]
        self.explained |= names
        if new:
            self.say(f"legend: {'; '.join(new)}")

    def advance(self, step: int, progress: float, metrics: dict[str, float], every: int) -> None:
        """Report a step. progress: share of the training done; metrics: see `describe`."""
        now = time.monotonic()
        progress = min(max(progress, 0.0), 1.0)
        if self.began is None:
            self.began, self.said_at = (now, progress), now  # the first step is slow, and says nothing yet
        done = progress - self.began[1]
        left = (now - self.began[0]) / done * (1 - progress) if done > 0 else None
        if progress == 1:
            left = 0.0
        bits = bits_of(metrics)
        # an encoder that writes no bytes has a distance instead, measured now and then
        total = sum(bits.values()) if bits else metrics.get("distance", self.distance)
        self.distance = metrics.get("distance", self.distance)
        untrained = UNTRAINED if step == 1 and "decoder" in bits else ""
        if math.isfinite(total):
            self.curve.add(total)
        if self.display is None:
            if step % every == 0 or now - self.said_at > QUIET or self.is_fresh:
                of_step = None if self.is_fresh else self.validated_at
                self.said_at, self.is_fresh = now, False
                self._explain(names_shown(metrics, self.validation))
                rest = "" if left is None else f" {clock(left)} left"
                told = describe(metrics, self.validation, of_step) + untrained
                self.say(f"{self.run}/{self.stage}: step {step} {progress:4.0%} {told}{rest}")
            return
        has = {"validation"} if self.validation else set()
        is_whole = "decoder" in bits
        self._explain(has | ({"bits" if is_whole else "alone"} if bits else {"distance"}))
        later = self.part.later_minutes
        unit = "{:.3f} bits/char" if is_whole else "{:.3f} bits/char in latents alone"
        self.picture = Picture(
            run=self.run,
            stage=f"{self.part}, {self.stage}",
            progress=progress,
            left=left,
            in_all=None if left is None or later is None else left + 60 * later,
            step=step,
            bits=(unit if bits else "distance {:.3f}").format(total) + untrained,
            validation=None if self.validation is None else self.validation["bound"],
            speed=metrics["characters_per_second"],
            curve=self.curve,
        )
        if now - self.drawn >= REDRAWN:
            self.drawn = now
            self._draw()

    def _draw(self) -> None:
        if self.display is not None and self.picture is not None:
            from rich.text import Text

            encoding = getattr(sys.__stdout__, "encoding", None) or "ascii"
            plain = "utf" not in encoding.lower()
            first, second = self.picture.lines(self.display.console.width, plain)
            text = Text(f"{first}\n{second}", no_wrap=True, overflow="crop")
            text.highlight_regex(r"[━#]+", "cyan")
            text.highlight_regex(r"validation [0-9.]+", "bold")
            self.display.update(text, refresh=True)
