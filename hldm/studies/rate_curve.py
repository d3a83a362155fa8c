"""What the latents carry against what it costs: one run a point, all for the same wall clock.

    hldm rate-curve --config configs/tiny.yaml --minutes 6

Each point is the config with one dial turned (the noise gamma_0 that the decoder reads through, the
latent's width, the rate weight, the chunk's length), trained, and measured on held-out text; the twin is
trained for the same minutes. Points are runs like any other, so a curve that was stopped goes on.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hldm.config import Config, ConfigError, changed, load_config, stage_training
from hldm.evaluation.tables import Table
from hldm.runs.identity import measured_once, origin_of, say_other_code, text_fingerprint
from hldm.runs.pairs import load_pair
from hldm.runs.reports import save_report
from hldm.sources.corpora import load_corpora
from hldm.text.bytes import count_characters
from hldm.text.corpus import Corpus, Split

# dial: key of the config, values beside the config's own
DIALS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "gamma_0": ("diffusion.gamma_0", (-4.0, -1.0, 1.0, 3.0)),
    "latent_dim": ("autoencoder.latent_dim", (2, 4, 8, 16)),
    "rate_weight": ("autoencoder.rate_weight", (0.1, 0.3, 0.6, 1.0)),
    "max_bytes": ("chunking.max_bytes", (6, 10, 16)),
}
COLUMNS: Mapping[str, tuple[str, str]] = {  # of the table: key and format
    "point": ("name", ""),
    "bound": ("bound", ".3f"),
    "±": ("standard_error", ".3f"),
    "of it latents": ("latent", ".3f"),
    "share": ("share", ".0%"),
    "x twin": ("times_twin", ".2f"),
    "clean bytes right": ("clean_accuracy", ".1%"),
    "characters a chunk": ("characters_per_chunk", ".1f"),
    "parameters": ("parameters", ",.0f"),
}
# of an evaluation, that are kept
BITS = ("bound", "standard_error", "standard_error_text", "latent", "decoder")
# Spent outside this repository on the test books of the built-in text, whole, by programs that were given its training
# text; COMPRESSED: its fingerprint.
COMPRESSORS = {"zpaq -m5": 1.306, "PPMd, order 8": 1.375}
COMPRESSED = "ea479a69c811c70c8a92eb8254c24adf59dfe22083c0ce3ec553fa7aa9a987bf"


class Point(NamedTuple):
    """One setting of one dial."""

    name: str  # of its run, below the curve's folder
    dial: str
    value: float
    config: Config


def read_base(
    path: Path, only: Sequence[str], known: Collection[str], overrides: Sequence[str] = ()
) -> Config:
    """The config that is varied. Raises ConfigError for a twin, and for names beside the known ones."""
    base = load_config([path], overrides)
    if base.is_twin:
        raise ConfigError(f"{path} is a twin: it has no latents to vary")
    for name in only:
        if name not in known:
            raise ConfigError(f"--only takes {', '.join(known)}, got {name!r:.80}")
    return base


def points(
    path: Path,
    minutes: float,
    only: Sequence[str] = (),
    clock: str = "wall",
    overrides: Sequence[str] = (),
) -> list[Point]:
    """The config as it is, then with one dial turned at a time, each for `minutes` over both stages."""
    base = read_base(path, only, DIALS, overrides)
    found = [Point("base", "base", math.nan, timed(base, minutes, clock))]
    for dial, (key, values) in DIALS.items():
        if only and dial not in only:
            continue
        for value in values:
            config = load_config([path], [*overrides, f"{key}={value:g}"])
            if config != base:
                name = f"{dial}-{value:g}".replace("--", "-minus-")
                found.append(Point(name, dial, value, timed(config, minutes, clock)))
    return found


def timed(config: Config, minutes: float, clock: str = "wall") -> Config:
    """The config with so many minutes for all its training, shared between the stages as they are now.

    clock: what minutes count (hldm.config.TrainingConfig)
    """
    if not 0 < minutes < math.inf:
        raise ConfigError(f"--minutes must be positive and finite, got {minutes:g}")
    first, second = config.training.autoencoder.minutes, config.training.prior.minutes
    share = 1.0 if config.is_twin else first / (first + second) if first and second else 0.5
    for stage, part in (("autoencoder", share), ("prior", 1 - share)):
        if part:
            config = stage_training(config, stage, minutes=minutes * part, clock=clock, steps=10**9)
    return config


def run_curve(
    path: Path,
    minutes: float,
    *,
    only: Sequence[str] = (),
    clock: str = "wall",
    overrides: Sequence[str] = (),
    root: Path = Path("runs"),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and measure every point that is not there yet, and the twin; returns the results.

    overrides: of all of them, the twin as well (hldm.runs.pairs)
    Leaves root/<name>-curve/<point>/, by the config's name, and rate-curve.json beside them, rewritten after every
    point. Raises ValueError or OSError.
    """
    model, twin = load_pair(path, overrides)
    varied = points(path, minutes, only, clock, overrides)
    todo = [Point("twin", "twin", math.nan, timed(twin, minutes, clock)), *varied]
    folder = root / f"{model.name}-curve"
    curve: dict[str, Any] = {
        "config": str(path),
        "name": model.name,
        "overrides": list(overrides),
        "minutes": minutes,
        "split": "test",
        "compressors": {},
        "points": [],
    }
    corpora = load_corpora(todo[0].config.data)
    text = text_fingerprint(corpora)
    for point in todo:
        say(f"{point.name}: {minutes:g} minutes")
        curve["points"].append(_measured(point, folder, text, say))
        curve["compressors"] = curve["compressors"] or _compressors(corpora)
        save_report(folder / "rate-curve.json", curve)
    say_other_code(curve["points"], say)
    return curve


def measure_once(
    name: str,
    config: Config,
    target: Path,
    text: str,
    measure: Callable[[Path], Mapping[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train folder/name and measure it, or read from target, folder/name/file, what was measured before.

    text: fingerprint of the config's text
    """
    from hldm.training.stages import train_run

    run = train_run(changed(config, name=name), root=target.parent.parent)
    return measured_once(target, origin_of(run, text), lambda: measure(run), say)


def _measured(point: Point, folder: Path, text: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and evaluate one point, or read what was measured before."""
    from hldm.evaluation.evaluate import evaluate_run

    evaluate = partial(evaluate_run, prompts=0)
    target = folder / point.name / "evaluation.json"
    evaluation = measure_once(point.name, point.config, target, text, evaluate, say)
    bits, reconstruction = evaluation["bits_per_character"], evaluation["reconstruction"]
    return {
        "name": point.name,
        "dial": point.dial,
        "value": None if math.isnan(point.value) else point.value,
        **{key: bits[key] for key in BITS},
        "share": bits["latent"] / bits["bound"],
        "clean_accuracy": reconstruction and reconstruction["clean"]["byte_accuracy"],
        "characters_per_chunk": evaluation["characters_per_chunk"],
        **evaluation["cost"],
        "origin": evaluation["origin"],
    }


def _compressors(corpora: Mapping[Split, Corpus]) -> dict[str, float]:
    """Bits per character that general compressors spend on the test text after the training text."""
    train, test = corpora["train"].text.tobytes(), corpora["test"].text.tobytes()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    sizes = [len(lzma.compress(text, filters=filters)) for text in (train, train + test)]
    found = {"xz -9e": 8 * (sizes[1] - sizes[0]) / count_characters(test)}
    return found | (COMPRESSORS if text_fingerprint(corpora) == COMPRESSED else {})


def table(curve: Mapping[str, Any]) -> Table:
    """The curve, a row a point, the dials in turn."""
    twin = next(p["bound"] for p in curve["points"] if p["name"] == "twin")
    return Table.of_records(({**p, "times_twin": p["bound"] / twin} for p in curve["points"]), COLUMNS)
