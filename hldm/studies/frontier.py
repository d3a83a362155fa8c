"""Bits against speed, after equal minutes of training: twins of several sizes beside latent recipes.

    hldm frontier --config configs/small.yaml --minutes 6 --clock cpu

"Times as fast as the twin" is not the fair question: a smaller twin is faster, too. The fair one is whether, at the
speed of a latent model, there is a twin with fewer bits. Runs are runs like any other, so a study that was stopped
goes on. All of them then write in turns, in one process: whatever slows a turn slows all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hldm.config import Config, ConfigError, GriffinConfig, changed
from hldm.evaluation.tables import Table
from hldm.runs.identity import text_fingerprint
from hldm.runs.pairs import load_pair
from hldm.runs.reports import save_report
from hldm.sources.corpora import load_corpora
from hldm.studies.rate_curve import measure_once, read_base, say_other_code, timed

if TYPE_CHECKING:
    from hldm.studies.bench_writing import Contestant

SIZES = (0.1, 0.25, 0.5, 1.0, 2.0)  # million parameters of the twins
PATTERN = ("recurrent", "recurrent", "attention")  # of their blocks, as in configs/small-twin.yaml
# Latent recipes: settings of the config that is given. Each takes weights away from what is read for every byte.
RECIPES: Mapping[str, tuple[str, ...]] = {
    "base": (),
    "narrow": ("autoencoder.encoder.width=96", "autoencoder.decoder.width=96"),
    "one-block": ("autoencoder.encoder.blocks=[recurrent]",),
    "unread": ("autoencoder.reads_text=false", "autoencoder.carry_state=true"),
    "phrases": ("chunking.min_bytes=8", "chunking.max_bytes=20", "autoencoder.latent_dim=8"),
}
ROWS = (1, 8, 64)  # written at once
PROMPT_BYTES = 1_000
TURNS = 5
SEEDS = 3  # of points that decide
DRAWS = 4  # of noise, for a bound
COLUMNS: Mapping[str, tuple[str, str]] = {  # of the table: key and format
    "point": ("name", ""),
    "seeds": ("seeds", "d"),
    "parameters": ("parameters", ",.0f"),
    "trained on, M": ("train_millions", ",.1f"),
    "bits": ("bound", ".3f"),
    "± seeds": ("deviation", ".3f"),
    "in latents": ("share", ".0%"),
    **{f"characters/s, {rows}": (f"speed_{rows}", ",.0f") for rows in ROWS},
    "to the first, ms": ("first_ms", ".0f"),
    **{f"under the twins, {rows}": (f"under_{rows}", "+.3f") for rows in ROWS},
}


class Entry(NamedTuple):
    """One model of the study."""

    name: str
    seed: int
    config: Config

    @property
    def folder(self) -> str:
        """Of its run, below the study's."""
        return f"{self.name}-seed-{self.seed}"


def entries(
    path: Path,
    minutes: float,
    *,
    only: Sequence[str] = (),
    repeated: Sequence[str] = (),
    clock: str = "wall",
    overrides: Sequence[str] = (),
) -> list[Entry]:
    """Twins of SIZES and RECIPES, each for the same minutes. Raises ConfigError.

    only: names of some of them;  repeated: names of those that are trained with SEEDS seeds instead of one
    """
    twins = {twin_name(size): size for size in SIZES}
    read_base(path, only, (*twins, *RECIPES), overrides)
    for name in repeated:
        if name not in (only or (*twins, *RECIPES)):
            raise ConfigError(f"--repeat takes {', '.join(only or (*twins, *RECIPES))}, got {name!r:.80}")
    found = []
    for name in [name for name in (*twins, *RECIPES) if not only or name in only]:
        model, twin = load_pair(path, [*overrides, *RECIPES.get(name, ())])
        config = resized(twin, twins[name]) if name in twins else model
        seeds = range(SEEDS if name in repeated else 1)
        found += [Entry(name, seed, changed(timed(config, minutes, clock), seed=seed)) for seed in seeds]
    return found


def twin_name(size: float) -> str:
    """twin-0.25M of 0.25 million parameters."""
    return f"twin-{size:g}M"


def resized(twin: Config, millions: float) -> Config:
    """A twin of about so many parameters: blocks grow with the third root of the size, the width fills it."""
    from hldm.training.twin import numbers

    wanted, shape = millions * 1e6, twin.autoencoder.decoder
    blocks = max(1, round(len(shape.blocks) * (wanted / numbers(twin, "autoencoder")) ** (1 / 3)))
    step = 4 * shape.heads  # what GriffinConfig asks of a width

    def of_width(width: int) -> Config:
        pattern = (PATTERN * blocks)[:blocks]
        decoder: GriffinConfig = changed(shape, width=width, blocks=pattern)
        return changed(twin, autoencoder=changed(twin.autoencoder, decoder=decoder))

    def off(width: int) -> float:
        return abs(numbers(of_width(width), "autoencoder") - wanted)

    width = step
    while off(width + step) < off(width):
        width += step
    return of_width(width)


def run_frontier(
    path: Path,
    minutes: float,
    *,
    only: Sequence[str] = (),
    repeated: Sequence[str] = (),
    clock: str = "wall",
    overrides: Sequence[str] = (),
    root: Path = Path("runs"),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and measure what is not there yet, let all of them write in turns, and return the results.

    overrides: of all of them (hldm.runs.pairs)
    Leaves root/<name>-frontier/<entry>/, and frontier.json beside them, rewritten after every run. Raises ValueError or
    OSError.
    """
    model, _ = load_pair(path, overrides)
    todo = entries(path, minutes, only=only, repeated=repeated, clock=clock, overrides=overrides)
    folder = root / f"{model.name}-frontier"
    study: dict[str, Any] = {"config": str(path), "name": model.name, "overrides": list(overrides)}
    study |= {"minutes": minutes, "clock": clock, "split": "test", "runs": []}
    text = text_fingerprint(load_corpora(todo[0].config.data))
    for entry in todo:
        say(f"{entry.name}, seed {entry.seed}: {minutes:g} minutes")
        target = folder / entry.folder / "frontier.json"
        row = measure_once(
            entry.folder, entry.config, target, text, partial(measure_bits, seed=entry.seed), say
        )
        twin = entry.config.is_twin
        study["runs"].append({"name": entry.name, "seed": entry.seed, "is_twin": twin, **row})
        save_report(folder / "frontier.json", study)
    say(f"{len(todo)} models write in turns")
    speeds = measure_speeds({entry.folder: folder / entry.folder for entry in todo})
    for entry, row in zip(todo, study["runs"], strict=True):
        row["speed"] = speeds[entry.folder]
    study["points"] = points_of(study["runs"])
    save_report(folder / "frontier.json", study)
    say_other_code(study["runs"], say)
    return study


# ---- what is measured


def measure_bits(run: Path, *, seed: int) -> dict[str, Any]:
    """Bits a character of the test text, and what training cost."""
    import torch

    from hldm.evaluation.bound import evaluate_bound, held_out_windows
    from hldm.evaluation.evaluate import cost_of
    from hldm.generation.pipeline import read_pipeline
    from hldm.runs.folder import corpora_of_run
    from hldm.runs.provenance import describe_environment

    pipeline = read_pipeline(run / "pipeline")
    windows = held_out_windows(pipeline.autoencoder, corpora_of_run(run)["test"])
    generator = torch.Generator().manual_seed(seed)
    bound = evaluate_bound(pipeline.autoencoder, pipeline.prior, windows, draws=DRAWS, generator=generator)
    bits = bound.bits_per_character()
    return {
        **{key: bits[key] for key in ("bound", "standard_error", "latent", "decoder")},
        **cost_of(run, pipeline),
        "cpu": describe_environment()["cpu"],
    }


def measure_speeds(runs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Characters a second of every run at ROWS rows, and seconds to the first piece of text: medians of TURNS turns."""
    import torch

    from hldm.runs.clock import in_turns
    from hldm.studies.bench_writing import Case, Continuing

    contestants = {name: _contestant(run) for name, run in runs.items()}
    cases = {rows: Case(rows, PROMPT_BYTES) for rows in ROWS}
    with torch.no_grad():
        running = {
            (name, rows): Continuing(someone, case)
            for name, someone in contestants.items()
            for rows, case in cases.items()
        }
        turns = in_turns({key: continuing.write for key, continuing in running.items()}, TURNS)
        firsts = in_turns(
            {name: partial(_first_piece, someone, cases[1]) for name, someone in contestants.items()}, TURNS
        )
    return {
        name: {
            **{
                str(rows): statistics.median(count / seconds for count, seconds in turns[name, rows])
                for rows in ROWS
            },
            "first_seconds": statistics.median(seconds for _, seconds in firsts[name]),
        }
        for name in runs
    }


def _first_piece(someone: Contestant, case: Any) -> None:
    """Read a prompt and write what comes first: a chunk, or the twin's first stretch."""
    someone.start(case).write()


def _contestant(run: Path) -> Contestant:
    """A trained run, which continues the beginning of its test text as it would for a user."""
    from hldm.generation.pipeline import read_pipeline
    from hldm.generation.writer import Writer, make_writer, row_generators
    from hldm.runs.folder import corpora_of_run
    from hldm.studies.bench_writing import Case, Contestant, prompts

    pipeline = read_pipeline(run / "pipeline")
    corpus = corpora_of_run(run)["test"]

    def start(case: Case) -> Writer:
        texts, generators = prompts(corpus, case), row_generators(0, case.rows)
        return make_writer(pipeline.autoencoder, pipeline.prior, texts, pipeline.settings, generators)

    return Contestant(0, start)


# ---- what it says


def points_of(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and of each latent recipe by how many bits it lies under the twins' curve (`bits_under`)."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(run["name"], []).append(run)
    points = []
    for name, found in by_name.items():
        bounds = [run["bound"] for run in found]
        millions = [(run["train_characters"] or math.nan) / 1e6 for run in found]
        points.append(
            {
                "name": name,
                "is_twin": found[0]["is_twin"],
                "seeds": len(found),
                "bound": statistics.fmean(bounds),
                "deviation": statistics.stdev(bounds) if len(found) > 1 else None,
                "share": statistics.fmean(run["latent"] / run["bound"] for run in found),
                "parameters": found[0]["parameters"],
                "train_millions": statistics.fmean(millions),
                **{
                    f"speed_{rows}": statistics.median(run["speed"][str(rows)] for run in found)
                    for rows in ROWS
                },
                "first_ms": 1e3 * statistics.median(run["speed"]["first_seconds"] for run in found),
            }
        )
    twins = [point for point in points if point["is_twin"]]
    for point in points:
        for rows in ROWS:
            key = f"speed_{rows}"
            curve = [(twin[key], twin["bound"]) for twin in twins]
            under = None if point["is_twin"] else bits_under(point[key], point["bound"], curve)
            point[f"under_{rows}"] = under
    return points


def bits_under(speed: float, bits: float, twins: Iterable[tuple[float, float]]) -> float | None:
    """By how many bits a model lies under the curve of twins (speed, bits); negative: above it. None without twins.

    The curve runs through the twins that no other beats in both, straight in the logarithm of the speed. Beyond its
    fastest the fastest counts, below its slowest the slowest: that twin would do.
    """
    best: list[tuple[float, float]] = []
    for other in sorted(twins, reverse=True):  # fastest first: a slower one counts where it has fewer bits
        if not best or other[1] < best[-1][1]:
            best.append(other)
    if not best:
        return None
    if speed >= best[0][0]:
        return best[0][1] - bits
    for (fast, more), (slow, fewer) in zip(best, best[1:], strict=False):
        if speed >= slow:
            place = math.log(speed / slow) / math.log(fast / slow)
            return fewer + place * (more - fewer) - bits
    return best[-1][1] - bits


def table(study: Mapping[str, Any]) -> Table:
    """A row a point: twins by size, then the recipes."""
    return Table.of_records(study["points"], COLUMNS)
