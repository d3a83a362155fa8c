"""Figures as PNG files, drawn without a display. Knows the shapes of the JSON it draws, and no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The three colours of every figure, distinguishable without colour vision (Okabe and Ito 2008).
LATENT, DECODER, TWIN = "#0072B2", "#E69F00", "#000000"


def plot_diagnosis(diagnosis: Mapping[str, Any], path: Path) -> None:
    """Six panels of what `hldm.studies.diagnosis.diagnose` measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3)

    ax = axes[0, 0]
    dims = sorted(diagnosis["latent_by_dimension"], reverse=True)
    ax.bar(range(len(dims)), dims, color=LATENT)
    rank = diagnosis["latents"]["effective_rank"]
    ax.set(title=f"latent bits by dimension (effective rank {rank:.1f})", xlabel="dimension, dearest first")
    ax.set_ylabel("bits per character")

    ax = axes[0, 1]
    levels = diagnosis["latent_by_level"]
    x = [row["log_snr"] for row in levels]
    ax.bar(x, [row["bits"] for row in levels], width=0.9 * abs(x[1] - x[0]), color=LATENT)
    ax.set(title="latent bits by noise level", xlabel="log SNR", ylabel="bits per character")
    error = ax.twinx()
    error.plot(x, [row["error"] for row in levels], color=DECODER)
    error.set_ylabel("mean square error of x0", color=DECODER)

    ax = axes[0, 2]
    readers = diagnosis["decoder"]["with_latents"]
    ax.barh(list(readers), [row["bits"] for row in readers.values()], color=DECODER)
    ax.invert_yaxis()
    ax.set(title="decoder with these latents", xlabel="bits per character")

    ax = axes[1, 0]
    curve = diagnosis["decoder"]["against_noise"]
    ax.plot([row["log_snr"] for row in curve], [row["accuracy"] for row in curve], "o-", color=DECODER)
    ax.set(title="decoder against noise", xlabel="log SNR of the latent", ylabel="symbols right")

    ax = axes[1, 1]
    places = diagnosis["by_place"]
    ax.bar([row["place"] for row in places], [row["bits"] for row in places], color=DECODER)
    ax.set(title="decoder bits by place in the chunk", xlabel="symbol of the chunk", ylabel="bits a symbol")

    ax = axes[1, 2]
    far = diagnosis["by_distance"]
    names = [f"{row['from']}" for row in far]
    latent = [row["latent"] for row in far]
    ax.bar(names, latent, color=LATENT, label="latent")
    ax.bar(names, [row["decoder"] for row in far], bottom=latent, color=DECODER, label="decoder")
    ax.set(title="by distance from the document's start", xlabel="bytes, from", ylabel="bits per character")
    ax.tick_params(axis="x", rotation=45)
    ax.legend(loc="lower left")
    _save(figure, path)


def plot_rate_curve(curve: Mapping[str, Any], path: Path) -> None:
    """Share of the bits in the latents against the bound, a line a dial; twin and compressors as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    ax = figure.subplots()
    by_dial: dict[str, list[Mapping[str, Any]]] = {}
    for point in curve["points"]:
        by_dial.setdefault(point["dial"], []).append(point)
    for point in by_dial.pop("twin", []):
        ax.axhline(point["bound"], color=TWIN, label=f"twin, {point['bound']:.3f}")
    for dial, found in by_dial.items():
        found = sorted(found, key=lambda point: point["share"])
        ax.errorbar(
            [point["share"] for point in found],
            [point["bound"] for point in found],
            yerr=[2 * point["standard_error"] for point in found],
            fmt="o-",
            label=dial,
        )
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
    from matplotlib.figure import Figure

    rows = [row for row in league["chunkers"] if row["target"] is not None]
    targets = sorted({row["target"] for row in rows})
    figure = Figure(figsize=(5 * max(len(targets), 1) + 2, 6), layout="constrained")
    panels = figure.subplots(1, max(len(targets), 1), squeeze=False, sharey=True)[0]
    for ax, target in zip(panels, targets, strict=False):
        found = sorted((row for row in rows if row["target"] == target), key=lambda row: row["bound"])
        names = [row["strategy"] for row in found]
        latent = [row["latent"] for row in found]
        rest = [row["bound"] - row["latent"] for row in found]
        ax.bar(names, latent, color=LATENT, label="latents")
        ax.bar(
            names,
            rest,
            bottom=latent,
            color=DECODER,
            label="decoder",
            yerr=[2 * row["standard_error"] for row in found],
        )
        for row in league["chunkers"]:
            if row["target"] is None:
                ax.axhline(row["bound"], color=TWIN, label=f"twin, {row['bound']:.3f}")
        ax.tick_params(axis="x", rotation=60)
        ax.set(title=f"{target:g} bytes a latent", ylabel="bits per character of the test text")
        ax.legend(loc="lower right")
    figure.suptitle(f"{league['config']}, {league['minutes']:g} minutes each; bars: 2 standard errors")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write whole or not at all."""
    from io import BytesIO

    from hldm.runs.files import atomic_write

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())
