"""Figures as PNG, SVG or PDF by the file's ending, drawn without a display. Knows JSON's shapes, and no model.

Axes begin where the values do, but for bars, which begin at zero; names stand at what they name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

P = ParamSpec("P")

# Colours that differ without colour vision (Okabe and Ito 2008).
LATENT, DECODER, TWIN = "#0072B2", "#E69F00", "#000000"
DIALS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
OTHERS = "#666666"  # compressors differ by their lines and names
DASHES = ((0, (1, 2)), (0, (5, 3)), (0, (7, 2, 1, 2)), (0, (3, 1)))
PAPER: dict[
    Any, Any
] = {  # what journals ask for: TrueType in PDF; and the same figure twice is the same file
    "pdf.fonttype": 42,
    "svg.hashsalt": "hldm",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}
NO_DATE = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def _styled(plot: Callable[P, None]) -> Callable[P, None]:
    """Draw with the settings of PAPER."""

    @wraps(plot)
    def styled(*arguments: P.args, **options: P.kwargs) -> None:
        from matplotlib import rc_context

        with rc_context(PAPER):
            plot(*arguments, **options)

    return styled


def _column(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


@_styled
def plot_diagnosis(diagnosis: Mapping[str, Any], *paths: Path) -> None:
    """Five panels of what `hldm.studies.diagnosis.diagnose` measured."""
    figure, ((dims, levels, variants), (noise, places, spare)) = _panels(2, 3, (13, 8))
    spare.axis("off")

    found = sorted(diagnosis["latent_by_dimension"], reverse=True)
    dims.bar(range(len(found)), found, color=LATENT)
    rank = diagnosis["latents"]["effective_rank"]
    title = f"latent bits by dimension (effective rank {rank:.1f})"
    dims.set(title=title, xlabel="dimension, dearest first", ylabel="bits per character")

    by_level = diagnosis["latent_by_level"]
    x = _column(by_level, "log_snr")
    levels.bar(x, _column(by_level, "bits"), width=0.9 * abs(x[1] - x[0]), color=LATENT)
    levels.set(title="latent bits by noise level", xlabel="log SNR", ylabel="bits per character")
    error = levels.twinx()
    error.spines.right.set_visible(True)
    error.plot(x, _column(by_level, "error"), color=DECODER)
    error.set_ylabel("mean square error of x0", color=DECODER)

    with_latents = diagnosis["decoder"]["with_latents"]
    bars = variants.barh(list(with_latents), _column(with_latents.values(), "bits"), color=DECODER)
    variants.bar_label(bars, fmt="%.2f", padding=3)
    variants.margins(x=0.14)
    variants.invert_yaxis()
    variants.set(title="decoder with these latents", xlabel="bits per character")

    curve = diagnosis["decoder"]["against_noise"]
    noise.plot(_column(curve, "log_snr"), _column(curve, "accuracy"), "o-", color=DECODER)
    noise.set(title="decoder against noise", xlabel="log SNR of the latent", ylabel="symbols right")

    by_place = diagnosis["by_place"]
    places.bar(_column(by_place, "place"), _column(by_place, "bits"), color=DECODER)
    places.set(
        title="decoder bits by place in the chunk", xlabel="symbol of the chunk", ylabel="bits a symbol"
    )

    _save(figure, paths)


@_styled
def plot_rate_curve(curve: Mapping[str, Any], *paths: Path) -> None:
    """Share of the bits in the latents against the bound, a line a dial; twin and compressors as lines."""
    figure, ((ax,),) = _panels(1, 1, (8, 5.5))
    base = [point for point in curve["points"] if point["dial"] == "base"]
    dials = [dial for dial in dict.fromkeys(_column(curve["points"], "dial")) if dial not in ("twin", "base")]
    for dial, colour in zip(dials, DIALS * len(dials), strict=False):
        # the base is a point of every dial's curve: its own value of it
        found = base + [point for point in curve["points"] if point["dial"] == dial]
        found.sort(key=lambda point: point["share"])
        _points(ax, found, colour)
        for point in found:
            if point["value"] is not None:
                _name(ax, f"{point['value']:g}", point["share"], point["bound"], colour)
        turned = [point for point in found if point["value"] is not None]
        highest = max(turned, key=lambda point: point["bound"])
        _name(ax, dial, highest["share"], highest["bound"], colour, (5, -10))
    _points(ax, base, TWIN)
    for point in base:
        _name(ax, "base", point["share"], point["bound"], TWIN, (5, -11))
    lines = [("twin", point["bound"], TWIN) for point in curve["points"] if point["dial"] == "twin"]
    lines += [(name, bits, OTHERS) for name, bits in curve["compressors"].items()]
    for (_, bits, colour), dash in zip(lines, ("-", *DASHES * len(lines)), strict=False):
        ax.axhline(bits, color=colour, linestyle=dash, linewidth=1.2, zorder=1)
    _name_lines(ax, lines)
    ax.set(
        title=f"{curve['config']}, {curve['minutes']:g} minutes a point; bars: 2 standard errors",
        xlabel="share of the bits that is in the latents",
        ylabel="bits per character of the test text, an upper bound",
    )
    _save(figure, paths)


def _points(ax: Any, found: Sequence[Mapping[str, Any]], colour: str) -> None:
    """Bounds by share, with twice their standard errors."""
    errors = [2 * error for error in _column(found, "standard_error")]
    ax.errorbar(
        _column(found, "share"), _column(found, "bound"), yerr=errors, fmt="o-", color=colour, markersize=5
    )


def _name(ax: Any, text: str, x: float, y: float, colour: str, offset: tuple[float, float] = (5, 4)) -> None:
    ax.annotate(text, (x, y), textcoords="offset points", xytext=offset, color=colour)


def _name_lines(ax: Any, lines: Sequence[tuple[str, float, str]]) -> None:
    """Names of horizontal lines at their right ends, outside of the frame, none over another."""
    low, high = ax.get_ylim()
    least = (high - low) * 0.035  # the height of a name
    place = low
    for name, bits, colour in sorted(lines, key=lambda line: line[1]):
        place = max(bits, place + least)
        ax.text(
            1.01, place, f"{name} {bits:.3f}", transform=ax.get_yaxis_transform(), color=colour, va="center"
        )


@_styled
def plot_league(league: Mapping[str, Any], *paths: Path) -> None:
    """Bits per character of every chunker, least first, a panel a length, beside the latents' share; twin as a line.

    The axis begins where the values do: chunkers differ by a hundredth.
    """
    rows = sorted(league["chunkers"], key=lambda row: row["bound"], reverse=True)
    targets = sorted({row["target"] for row in rows} - {None}) or [None]
    panels = [[row for row in rows if row["target"] == target and row["target"]] for target in targets]
    heights = [len(found) + 2 for found in panels]
    figure, axes = _panels(
        len(targets),
        2,
        (8.5, 1.2 + 0.27 * sum(heights)),
        sharex="col",
        sharey="row",
        height_ratios=heights,
        width_ratios=(3, 1),
    )
    twins = [row["bound"] for row in rows if row["target"] is None]
    for (bounds, shares), target, found in zip(axes, targets, panels, strict=True):
        names, bits = _column(found, "strategy"), _column(found, "bound")
        errors = [2 * row["standard_error"] for row in found]
        bounds.errorbar(bits, names, xerr=errors, fmt="o", color=LATENT, markersize=5)
        for name, value in zip(names, bits, strict=True):
            _name(bounds, f"{value:.3f}", value, name, TWIN, (7, -3))
        for twin in twins:
            bounds.axvline(twin, color=TWIN, linewidth=1.2, zorder=1)
            bounds.text(twin, 1.0, f" twin {twin:.3f}", transform=bounds.get_xaxis_transform(), va="top")
        bounds.margins(x=0.12, y=0.09)
        bounds.grid(axis="y", color="#dddddd", linewidth=0.6)
        bounds.set_title("" if target is None else f"{target:g} bytes a latent", loc="right")
        share = [row["latent"] / row["bound"] for row in found]
        labels = shares.bar_label(
            shares.barh(names, share, color=LATENT, height=0.6), fmt="{:.0%}", padding=3
        )
        assert len(labels) == len(found)
        shares.set_xlim(0, 1)
    axes[-1][0].set_xlabel("bits per character of the test text")
    axes[-1][1].set_xlabel("share in the latents")
    figure.suptitle(
        f"{league['config']}, {league['minutes']:g} minutes each; bars: 2 standard errors", fontsize=10
    )
    _save(figure, paths)


@_styled
def plot_frontier(study: Mapping[str, Any], *paths: Path) -> None:
    """Bits against characters a second, a panel for each number of texts at once; twins joined by size."""
    points = study["points"]
    rows = [int(key.removeprefix("speed_")) for key in points[0] if key.startswith("speed_")]
    figure, (panels,) = _panels(1, len(rows), (4.5 * len(rows), 4.2), sharey=True)
    twins = [point for point in points if point["is_twin"]]
    for ax, count in zip(panels, rows, strict=True):
        speed = f"speed_{count}"
        ax.plot(_column(twins, speed), _column(twins, "bound"), "-", color=TWIN, linewidth=1, zorder=1)
        for point in points:
            colour = TWIN if point["is_twin"] else LATENT
            error = None if point["deviation"] is None else 2 * point["deviation"]
            ax.errorbar(point[speed], point["bound"], yerr=error, fmt="o", color=colour, markersize=5)
            _name(ax, point["name"], point[speed], point["bound"], colour)
        ax.set_xscale("log")
        ax.margins(x=0.2, y=0.1)
        ax.set(title=f"{count} at once" if count > 1 else "one text", xlabel="characters a second")
    panels[0].set_ylabel("bits per character of the test text")
    figure.suptitle(f"{study['config']}, {study['minutes']:g} minutes each; bars: 2 deviations over seeds")
    _save(figure, paths)


@_styled
def plot_parts(parts: Mapping[str, Any], *paths: Path) -> None:
    """Three panels of what `hldm.evaluation.parts_table.parts_of_run` measured."""
    figure, ((worths, steps, shares),) = _panels(1, 3, (17, 6), width_ratios=(2, 1.2, 1))
    rows = list(parts["rows"].values())
    for place, (key, colour) in enumerate((("hidden", LATENT), ("retrained", DECODER))):
        found = [(at + 0.4 * place, row[key]) for at, row in enumerate(rows) if row[key]]
        if found:
            y, bits = [at for at, _ in found], [worth["bits"] for _, worth in found]
            errors = [2 * (worth["standard_error"] or 0) for _, worth in found]
            worths.barh(y, bits, height=0.4, xerr=errors, color=colour, label=key)
    worths.set_yticks(range(len(rows)), [row["part"].strip() for row in rows])
    worths.invert_yaxis()
    worths.set_xscale("symlog", linthresh=1e-3)
    worths.axvline(0, color=TWIN, linewidth=0.8)
    worths.set(title="worth of a part; bars: 2 standard errors", xlabel="bits per character lost without it")
    if any(row["retrained"] for row in rows):
        figure.legend(*worths.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)

    samplers = [row for row in parts["steps"] if row["steps"]]
    steps.plot(_column(samplers, "steps"), _column(samplers, "over"), "o-", color=LATENT)
    steps.set_xscale("log", base=2)
    steps.set_yscale("log")
    steps.set(title="few denoising steps", xlabel="steps", ylabel="bits per character above endlessly many")

    sure = parts["sure"]
    bars = {
        "sure of\na byte": sure["model"],
        "twin": sure["twin"],
        "two writings\nagree": parts["agreement"]["share"],
    }
    known = {name: share for name, share in bars.items() if share is not None}
    colours = dict(zip(bars, (DECODER, TWIN, LATENT), strict=True))
    shares.bar(list(known), list(known.values()), color=[colours[name] for name in known])
    shares.set(title="what a latent tells the decoder", ylim=(0, 1), ylabel="share")
    figure.suptitle(f"{parts['run']}, {parts['characters']:,} characters")
    _save(figure, paths)


def _panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes (rows columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure: Any, paths: Sequence[Path]) -> None:
    """Write each whole or not at all, as what its ending says. Raises ValueError for any other ending."""
    from io import BytesIO

    from hldm.runs.files import atomic_write
    from hldm.runs.reports import picture_kind

    for path in paths:
        kind = picture_kind(path)
        buffer = BytesIO()
        figure.savefig(buffer, format=kind, dpi=160, metadata=NO_DATE[kind])
        atomic_write(path, buffer.getvalue())
