"""Figures as PNG files, drawn without a display. Knows the shapes of the JSON it draws, and no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The three colours of every figure, distinguishable without colour vision (Okabe and Ito 2008).
LATENT, DECODER, TWIN = "#0072B2", "#E69F00", "#000000"


def _column(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


def _stacked(
    ax: Any, names: Sequence[str], latent: Sequence[float], decoder: Sequence[float], **style: Any
) -> None:
    """Bars of bits per character, latents below decoder."""
    ax.bar(names, latent, color=LATENT, label="latents")
    ax.bar(names, decoder, bottom=latent, color=DECODER, label="decoder", **style)
    ax.set_ylabel("bits per character")


def plot_diagnosis(diagnosis: Mapping[str, Any], path: Path) -> None:
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
    error.plot(x, _column(by_level, "error"), color=DECODER)
    error.set_ylabel("mean square error of x0", color=DECODER)

    with_latents = diagnosis["decoder"]["with_latents"]
    variants.barh(list(with_latents), _column(with_latents.values(), "bits"), color=DECODER)
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

    _save(figure, path)


def plot_rate_curve(curve: Mapping[str, Any], path: Path) -> None:
    """Share of the bits in the latents against the bound, a line a dial; twin and compressors as lines."""
    figure, ((ax,),) = _panels(1, 1, (9, 6))
    for dial in dict.fromkeys(_column(curve["points"], "dial")):
        found = [point for point in curve["points"] if point["dial"] == dial]
        if dial == "twin":
            ax.axhline(found[0]["bound"], color=TWIN, label=f"twin, {found[0]['bound']:.3f}")
            continue
        found.sort(key=lambda point: point["share"])
        share, bound = _column(found, "share"), _column(found, "bound")
        errors = [2 * error for error in _column(found, "standard_error")]
        ax.errorbar(share, bound, yerr=errors, fmt="o-", label=dial)
        for point in found:
            name = "base" if point["value"] is None else f"{point['value']:g}"
            ax.annotate(name, (point["share"], point["bound"]), textcoords="offset points", xytext=(5, 4))
    for name, bits in curve["compressors"].items():
        ax.axhline(bits, color="#999999", linestyle=":", label=f"{name}, {bits:.3f}")
    ax.set(
        title=f"{curve['config']}, {curve['minutes']:g} minutes a point; bars: 2 standard errors",
        xlabel="share of the bits that is in the latents",
        ylabel="bits per character of the test text, an upper bound",
    )
    ax.legend()
    _save(figure, path)


def plot_league(league: Mapping[str, Any], path: Path) -> None:
    """Bits per character of every chunker, latents below decoder, a panel a length; the twin as a line."""
    rows = sorted(league["chunkers"], key=lambda row: row["bound"])
    targets = sorted({row["target"] for row in rows} - {None})
    panels = max(len(targets), 1)
    figure, (axes,) = _panels(1, panels, (5 * panels + 2, 6), sharey=True)
    for ax, target in zip(axes, targets, strict=False):
        found = [row for row in rows if row["target"] == target]
        latent, errors = _column(found, "latent"), [2 * row["standard_error"] for row in found]
        rest = [row["bound"] - row["latent"] for row in found]
        _stacked(ax, _column(found, "strategy"), latent, rest, yerr=errors)
        for row in rows:
            if row["target"] is None:
                ax.axhline(row["bound"], color=TWIN, label=f"twin, {row['bound']:.3f}")
        ax.tick_params(axis="x", rotation=60)
        ax.set(title=f"{target:g} bytes a latent", ylabel="bits per character of the test text")
        ax.legend(loc="lower right")
    figure.suptitle(f"{league['config']}, {league['minutes']:g} minutes each; bars: 2 standard errors")
    _save(figure, path)


def plot_parts(parts: Mapping[str, Any], path: Path) -> None:
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
    worths.legend()

    samplers = [row for row in parts["steps"] if row["steps"]]
    steps.plot(_column(samplers, "steps"), _column(samplers, "over"), "o-", color=LATENT)
    steps.set_xscale("log", base=2)
    steps.set_yscale("log")
    steps.set(title="ancestral sampler", xlabel="steps S", ylabel="L_S - L_inf, bits per character")

    sure = parts["sure"]
    bars = {
        "given z_0": sure["model"],
        "twin": sure["twin"],
        "two writings\nagree": parts["agreement"]["share"],
    }
    known = {name: share for name, share in bars.items() if share is not None}
    colours = {"given z_0": DECODER, "twin": TWIN}
    shares.bar(list(known), list(known.values()), color=[colours.get(name, LATENT) for name in known])
    shares.set(title="bytes the decoder is sure of", ylim=(0, 1), ylabel="share")
    figure.suptitle(f"{parts['run']}, {parts['characters']:,} characters")
    _save(figure, path)


def _panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes (rows columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure: Any, path: Path) -> None:
    """Write whole or not at all."""
    from io import BytesIO

    from hldm.runs.files import atomic_write

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())
