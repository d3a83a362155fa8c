"""The page itself: from a run, or two, to HTML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hldm.app.page import fill, finite
from hldm.app.report.charts import Line, line_chart
from hldm.app.report.gather import Run, look, origin_of, parts_of, read_run
from hldm.config import to_yaml
from hldm.evaluation.parts_table import tables
from hldm.evaluation.tables import Table, compare
from hldm.runs.doing import doing
from hldm.runs.export import without_places
from hldm.text.bytes import END_MARK

PAGE_MARK = b"<!doctype html><!-- hldm report -->"  # how such a page begins
AXES = {
    "seconds": ("minutes of training", 60.0),
    "characters": ("characters read", 1.0),
    "step": ("steps", 1.0),
}
BITS = {"latent": "latents", "decoder": "decoder", "end": "end term", "validation_bound": "held out"}
COLOURS = {"latent": "latent", "decoder": "decoder", "validation_bound": "other"}
# other panels: key, title, format of the last value, whether the axis is logarithmic
PANELS = (
    ("learning_rate", "learning rate", ".2g", False),
    ("gradient_norm", "gradient norm", ".2g", True),
    ("characters_per_second", "characters a second", ",.0f", False),
    ("rank", "effective rank of the latents", ".2f", False),
    ("prototypes", "prototypes in use", ".0f", False),
    ("weights_bits", "entropy of the mixture's weights, bits", ".2f", False),
    ("largest_bin", "largest share of a noise level's bin", ".2f", False),
)


def build_report(
    folder: Path,
    *,
    against: Path | None = None,
    text: Path | None = None,
    measure: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> str:
    """The report of a run as one HTML page. Raises ValueError or OSError, one line."""
    run = read_run(folder, text=text, measure=measure, say=say)
    other = None if against is None else read_run(against, text=text, measure=measure, say=say)
    runs = [run] if other is None else [run, other]
    names = [one.name for one in runs]
    if len(set(names)) < len(names):
        names = [str(one.folder) for one in runs]
    measured = {name: one.evaluation for name, one in zip(names, runs, strict=True) if one.evaluation}
    table = compare(measured) if measured else None
    origin = origin_of(run)
    with doing(f"1 of 2, reading a passage with {run.name} and writing samples"):
        seen = look(run, other, seed=seed)
    with doing(f"2 of 2, measuring what each part of {run.name} is worth"):
        parts = parts_of(run, text)
    data = {key: seen[key] for key in ("passage", "map", "paths")}
    return fill(
        "report/report.html",
        mark=Markup(PAGE_MARK.decode()),  # noqa: S704 - our own
        names=names,
        end_mark=END_MARK,
        run=run,
        is_twin=run.pipeline is not None and run.pipeline.prior is None,
        headline=_headline(run, other),
        curves=curves(runs),
        table=table,
        parts=[] if parts is None else [(one, isinstance(one, Table)) for one in tables(parts)],
        **seen,
        faults=[(name, faults_of(one)) for name, one in zip(names, runs, strict=True)],
        origin=origin,
        settings="" if run.config is None else without_places(to_yaml(run.config)),
        data=finite(data),
    )


def _headline(run: Run, other: Run | None) -> list[dict[str, str]]:
    """The few figures on top: what each is, and what it is beside the other run's."""
    if run.evaluation is None:
        return []
    bits = run.evaluation["bits_per_character"]
    error = bits.get("standard_error")
    first = "bits per character, an upper bound" if bits.get("latent") else "bits per character"
    found = [_figure(f"{bits['bound']:.3f}", first, f"± {error:.3f}" if error else "")]
    if other is not None and other.evaluation is not None:
        theirs = other.evaluation["bits_per_character"]["bound"]
        ratio = f"{run.name} takes {bits['bound'] / theirs:.2f} times as many"
        found.append(_figure(f"{theirs:.3f}", f"bits of {other.name}; {ratio}"))
    if bits.get("latent"):
        found.append(_figure(f"{bits['latent'] / bits['bound']:.0%}", "of the bits are in the latents"))
    if (length := run.evaluation.get("characters_per_chunk")) is not None:
        found.append(_figure(f"{length:.1f}", "characters a chunk"))
    if cost := run.evaluation.get("cost"):
        found.append(_figure(f"{cost['parameters'] / 1e6:.2f} M", "parameters"))
        if (seconds := cost.get("train_seconds")) is not None:
            minutes = seconds / 60
            found.append(_figure(f"{minutes:.{1 if minutes < 10 else 0}f}", "minutes of training"))
    return found


def _figure(value: str, name: str, note: str = "") -> dict[str, str]:
    return {"value": value, "name": name, "note": note}


def faults_of(run: Run) -> list[str]:
    """What is missing, what is dead, and what was noted in training: a line each."""
    alive = (run.evaluation or {}).get("alive") or {}
    noted = [f"{log.stage}: {line}" for log in run.logs for line in log.notes]
    return [*run.notes, *alive.get("complaints", []), *noted]


def curves(runs: list[Run]) -> list[dict[str, Any]]:
    """Charts of each stage: the bits first, then other panels; each over every axis that its lines have."""
    found = []
    for stage in dict.fromkeys(log.stage for run in runs for log in run.logs):
        panels = []
        for title, keys, form, log in _panels(runs, stage):
            charts = {axis: _chart(runs, stage, title, keys, axis, form, log) for axis in AXES}
            drawn = {axis: chart for axis, chart in charts.items() if chart}
            if drawn:
                panels.append({"title": title, "charts": drawn})
        if panels:
            found.append({"stage": stage, "panels": panels})
    return found


def _panels(runs: list[Run], stage: str) -> list[tuple[str, dict[str, str], str, bool]]:
    """Title, keys with the names of their lines, format and kind of axis of the panels that a stage has."""
    present = {
        key for run in runs for log in run.logs if log.stage == stage for row in log.rows for key in row
    }
    bits = {key: name for key, name in BITS.items() if key in present}
    found = [("bits per character", bits, ".3f", False)] if bits else []
    return found + [(title, {key: ""}, form, log) for key, title, form, log in PANELS if key in present]


def _chart(
    runs: list[Run], stage: str, title: str, keys: dict[str, str], axis: str, form: str, log: bool
) -> Markup:
    """One panel over one axis; the second run dashed."""
    x_name, unit = AXES[axis]
    lines = []
    for index, run in enumerate(runs):
        for found in (one for one in run.logs if one.stage == stage):
            drawn = {key: found.curve(key, axis) for key in keys}
            if drawn.get("latent") and drawn.get("decoder"):
                both = _sum(drawn["latent"], drawn["decoder"])
                lines.append(Line("sum", _scaled(both, unit), "total", index > 0))
            for key, points in drawn.items():
                colour = COLOURS.get(key, "other")
                lines.append(Line(keys[key], _scaled(points, unit), colour, index > 0))
    return line_chart(f"{stage}: {title}", lines, x_name, form, log)


def _scaled(points: list[tuple[float, float]], unit: float) -> list[tuple[float, float]]:
    return [(x / unit, y) for x, y in points]


def _sum(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Two curves added where both have a value."""
    other = dict(b)
    return [(x, y + other[x]) for x, y in a if x in other]
