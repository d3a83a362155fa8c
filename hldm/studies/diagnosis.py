"""What a trained run's latents hold, what they cost under the prior and what the decoder does with them.

    hldm diagnose --run runs/demo --json demo.json --png demo.png

Numbers to decide by what to try next, all on held-out text: latent statistics, the diffusion term by
dimension and by noise level, the decoder's bits with right, wrong and sampled latents, its accuracy
against noise, bits by place in the chunk and by distance from the document's start, nearest chunks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hldm.evaluation.bound import held_out_windows
from hldm.evaluation.reconstruction import read_windows
from hldm.evaluation.sampled import sampled_latents
from hldm.evaluation.tables import Table, cell
from hldm.generation.pipeline import read_pipeline
from hldm.model.autoencoder import Autoencoder
from hldm.model.contextualiser import Context
from hldm.model.diffusion import alpha_sigma
from hldm.model.likelihood import noisy_latents, read_chunks
from hldm.model.prior import Prior, price_latents
from hldm.model.state import Encoding
from hldm.model.vitals import effective_rank
from hldm.runs.doing import doing
from hldm.runs.folder import corpora_of_run
from hldm.runs.location import pipeline_of
from hldm.sources.corpora import corpus_of_file
from hldm.text.corpus import Split
from hldm.text.windows import Batch, Windows, draw_normal

NOISE_LEVELS = 9  # points of the curve of accuracy against noise
ENOUGH_CHUNKS = 4000  # where a figure needs a pass of its own: a standard error of about 1 % of it
NEIGHBOURS, PROBES = 5, 12
SHOWN_BINS = 16  # of log SNR
SAMPLER_STEPS = 16  # of the latents sampled to see what the decoder makes of them

# tables of the summary: key and format by head
BITS = {"bits": ("bits", ".4f"), "symbols right": ("accuracy", ".2%")}
LATENTS = {  # what each of them is
    "own": "the chunk's latent, noise as in training",
    "clean": "the same without noise",
    "zero": "zeros in its place",
    "shuffled": "another chunk's latent",
    "other document": "one of another document",
    "sampled": "one that the prior draws",
}
AGAINST_NOISE = {"log SNR": ("log_snr", ".2f"), **BITS}
LATENT_BITS = {"latent bits": ("bits", ".4f"), "mean square error": ("error", ".4f")}
BY_LEVEL = {"log SNR": ("log_snr", ".2f"), **LATENT_BITS}
SYMBOL_BITS = {"symbols": ("symbols", ",.0f"), "bits a symbol": ("bits", ".4f")}
BY_PLACE = {"place in the chunk": ("place", ""), **SYMBOL_BITS}


def diagnose_run(
    folder: Path, *, split: Split = "validation", text: Path | None = None, draws: int = 8, seed: int = 0
) -> dict[str, Any]:
    """`diagnose` of a run folder's pipeline on held-out text of its data, or on the file `text`.

    Raises ValueError or OSError.
    """
    pipeline = read_pipeline(pipeline_of(folder))
    if pipeline.prior is None:
        raise ValueError(f"{folder} is a twin: it has no latents to diagnose")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    autoencoder, prior = pipeline.autoencoder.eval(), pipeline.prior.eval()
    corpus = corpora_of_run(folder)[split] if text is None else corpus_of_file(text)
    windows = held_out_windows(autoencoder, corpus)
    if windows.chunks < 2:
        raise ValueError(f"{corpus.name} holds a single chunk: there is nothing to compare its latent with")
    with doing(f"diagnosing {folder.resolve().name} on {windows.characters:,} characters"):
        found = diagnose(autoencoder, prior, windows, draws=draws, seed=seed)
    return {"run": folder.resolve().name, "split": split if text is None else str(text), **found}


@torch.no_grad()
def diagnose(
    autoencoder: Autoencoder, prior: Prior, windows: Windows, *, draws: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Diagnose a latent model on Windows(..., shuffle=False), as JSON. All bits are per character.

    draws: noise levels a chunk.
    """
    device = next(autoencoder.parameters()).device
    generator, variant_generator = (torch.Generator().manual_seed(seed + k) for k in range(2))
    rows = windows.lanes
    memory, decoder = prior.initial_state(rows, device), autoencoder.decoder_state(rows, device)
    latents: list[Tensor] = []
    nats = np.zeros(2)  # latent (diffusion and end terms), decoder
    places = np.zeros(
        (2, autoencoder.chunking.max_bytes + 1)
    )  # nats and number of symbols by place in the chunk
    levels: list[tuple[Tensor, Tensor]] = []  # gamma and squared errors of a window
    reads: dict[str | float, np.ndarray] = {}  # nats, symbols right, symbols, characters, by kind of latent
    seen = 0
    for batch, encoding in read_windows(autoencoder, windows):
        context, memory = prior.contextualiser(
            encoding.latents, encoding.mask, encoding.doc_start, memory, encoding.after
        )
        paid = price_latents(prior, encoding, context, batch, generator, draws)
        z_0 = noisy_latents(encoding, prior.diffusion.gamma_0, batch, generator)
        before = decoder
        reading, decoder = read_chunks(autoencoder, batch, z_0, decoder, encoding)
        nats += [float((paid.latent + paid.end).sum()), float(reading.nats.sum())]
        is_symbol = reading.events.mask
        place = reading.events.place[is_symbol].cpu().numpy()
        symbol_nats = reading.symbol_nats[is_symbol].double().cpu().numpy()
        places += [np.bincount(place, weights, places.shape[1]) for weights in (symbol_nats, None)]
        latents.append(encoding.latents[encoding.mask])
        if seen < ENOUGH_CHUNKS:
            levels.append(_errors_by_level(prior, encoding, context, batch, generator, draws))
            for name, latent in _variants(prior, encoding, context, batch, variant_generator).items():
                read, _ = read_chunks(autoencoder, batch, latent, before, encoding)
                sums = (read.nats.sum(), read.correct.sum(), read.events.mask.sum(), batch.characters)
                reads[name] = reads.get(name, np.zeros(4)) + [float(x) for x in sums]
        seen += int(encoding.mask.sum())
    characters, mu = windows.characters, torch.cat(latents)
    bits = nats / math.log(2) / characters
    return {
        "characters": characters,
        "chunks": seen,
        "characters_per_chunk": characters / seen,
        "bits_per_character": {"latent": float(bits[0]), "decoder": float(bits[1])},
        "latents": _statistics(mu, prior),
        **_bits_by_level(levels, prior, characters / seen),
        "decoder": _bits_by_variant(reads),
        "by_place": [
            {"place": k, "symbols": float(count), "bits": float(total / count / math.log(2))}
            for k, (total, count) in enumerate(places.T)
            if count
        ],
        "neighbours": _neighbours(mu[:ENOUGH_CHUNKS], windows),
    }


def _statistics(mu: Tensor, prior: Prior) -> dict[str, Any]:
    """Deviation, effective rank and capacity of latents mu (k z).

    capacity: sum of 0.5 log2(1 + SNR_0 variance) over the covariance's eigenvalues, the most bits that
    z_0 can say of mu if mu were Gaussian.
    """
    covariance = torch.cov(mu.double().T).reshape(mu.shape[1], mu.shape[1])
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    snr = math.exp(-prior.diffusion.gamma_0)
    return {
        "deviation": mu.std(dim=0).tolist(),
        "mean": mu.mean(dim=0).tolist(),
        "effective_rank": effective_rank(mu),
        "capacity_bits": float(0.5 * (1 + snr * eigenvalues).log2().sum()),
    }


def _errors_by_level(
    prior: Prior, encoding: Encoding, context: Context, batch: Batch, generator: torch.Generator, draws: int
) -> tuple[Tensor, Tensor]:
    """gamma (k m) and (x0 - x0_hat)^2 (k m z) of a window's k chunks, m draws each.

    gamma is drawn uniformly here: every level is to be seen, not only those that matter.
    """
    b, n, z = encoding.latents.shape
    low, high = prior.diffusion.gamma_0, prior.diffusion.gamma_1
    offset = torch.rand(b, n, 1, generator=generator)
    gamma = low + (high - low) * ((torch.arange(draws) + offset) / draws).to(encoding.latents.device)
    noise = draw_normal(batch, (n, draws, z), generator)
    x0 = encoding.latents[:, :, None].expand_as(noise)
    x0_hat = prior.estimate(x0, gamma, noise, context.first(n))
    return gamma[encoding.mask].cpu(), (x0 - x0_hat).square()[encoding.mask].double().cpu()


def _bits_by_level(
    levels: list[tuple[Tensor, Tensor]], prior: Prior, characters_per_chunk: float
) -> dict[str, Any]:
    """The diffusion term by dimension, and by log-SNR bin with the mean square error a dimension.

    Bits per character. levels: of each window, see `_errors_by_level`
    """
    gamma, error = (torch.cat(parts) for parts in zip(*levels, strict=True))  # (k m), (k m z)
    low, high = prior.diffusion.gamma_0, prior.diffusion.gamma_1
    cost = 0.5 * torch.exp(-gamma)[..., None] * error * (high - low) / gamma.shape[1]
    cost = cost / (len(gamma) * characters_per_chunk * math.log(2))
    level = ((gamma - low) / (high - low) * SHOWN_BINS).long().clamp(0, SHOWN_BINS - 1).flatten().numpy()
    bits, errors, draws = (
        np.bincount(level, weights, SHOWN_BINS)
        for weights in (cost.sum(dim=-1).flatten(), error.mean(dim=-1).flatten(), None)
    )
    width = (high - low) / SHOWN_BINS
    return {
        "latent_by_dimension": cost.sum(dim=(0, 1)).tolist(),
        "latent_by_level": [
            {
                "log_snr": -(low + (k + 0.5) * width),
                "bits": float(bits[k]),
                "error": float(errors[k] / draws[k]),
            }
            for k in range(SHOWN_BINS)
        ],
    }


def _variants(
    prior: Prior, encoding: Encoding, context: Context, batch: Batch, generator: torch.Generator
) -> dict[str | float, Tensor]:
    """Latents (b n z) to read the same text with, by name or gamma: what does the decoder owe to the right ones?"""
    mu, mask = encoding.latents, encoding.mask
    gamma_0, gamma_1 = prior.diffusion.gamma_0, prior.diffusion.gamma_1
    noise = draw_normal(batch, mu.shape[1:], generator)
    shuffled = mu.clone()
    shuffled[mask] = mu[mask][torch.randperm(int(mask.sum()), generator=generator).to(mu.device)]
    alpha_0, sigma_0 = (part.to(mu) for part in alpha_sigma(torch.tensor(gamma_0)))
    latents = {
        "own": mu,
        "zero": torch.zeros_like(mu),
        "shuffled": shuffled,
    }
    if len(mu) > 1:
        latents["other document"] = mu.roll(1, dims=0)
    variants: dict[str | float, Tensor] = {"own": mu, "clean": alpha_0 * mu}
    variants |= {name: alpha_0 * latent + sigma_0 * noise for name, latent in latents.items()}
    variants["sampled"] = sampled_latents(prior, context.first(mu.shape[1]), SAMPLER_STEPS, generator)
    for gamma in torch.linspace(gamma_0 - 4, gamma_1, NOISE_LEVELS):
        # the decoder expects the signal at alpha_0 whatever the noise: only the noise changes
        alpha, sigma = (part.to(mu) for part in alpha_sigma(gamma))
        variants[float(gamma)] = alpha_0 / alpha * (alpha * mu + sigma * noise)
    return variants


def _bits_by_variant(reads: Mapping[str | float, np.ndarray]) -> dict[str, Any]:
    """Bits per character and share of likeliest symbols right, with each kind of latent and at each gamma."""
    figures = {
        name: {"bits": nats / characters / math.log(2), "accuracy": right / symbols}
        for name, (nats, right, symbols, characters) in reads.items()
    }
    return {
        "with_latents": {name: row for name, row in figures.items() if isinstance(name, str)},
        "against_noise": [
            {"log_snr": -gamma, **row} for gamma, row in figures.items() if isinstance(gamma, float)
        ],
    }


def _neighbours(mu: Tensor, windows: Windows) -> list[dict[str, Any]]:
    """The nearest chunks with another text, by Euclidean distance, of a few chunks. mu: (k z)."""
    border = np.append(np.flatnonzero(windows.chunk_start), len(windows.corpus.text))
    # chunks in the order they were read: window by window, stream by stream
    index = np.concatenate(
        [b.chunk_index[b.is_chunk].numpy() for b in map(windows.batch, range(windows.windows_per_epoch))]
    )[: len(mu)]
    texts = [windows.corpus.text[border[i] : border[i + 1]].tobytes().decode(errors="replace") for i in index]
    table = []
    for probe in np.linspace(0, len(mu) - 1, PROBES, dtype=int):
        near: dict[str, float] = {}
        distance = (mu - mu[probe]).norm(dim=1)
        for other in distance.argsort().tolist():
            if texts[other] != texts[probe] and texts[other] not in near:
                near[texts[other]] = round(float(distance[other]), 3)
            if len(near) == NEIGHBOURS:
                break
        table.append({"chunk": texts[probe], "nearest": near})
    return table


def summary(diagnosis: Mapping[str, Any]) -> list[str | Table]:
    """The figures that a page can hold, as texts and tables."""
    bits, latents = diagnosis["bits_per_character"], diagnosis["latents"]
    head = [
        f"{diagnosis['characters']:,} characters in {diagnosis['chunks']:,} chunks of "
        f"{diagnosis['characters_per_chunk']:.2f}",
        f"bits per character: {bits['latent']:.4f} for latents + {bits['decoder']:.4f} for bytes, given the latents",
        f"latents: {latents['effective_rank']:.1f} independent directions (effective rank) of "
        f"{len(latents['deviation'])} numbers, with room for at most "
        f"{latents['capacity_bits'] / diagnosis['characters_per_chunk']:.3f} bits per character; cost of each number "
        + " ".join(f"{x:.3f}" for x in sorted(diagnosis["latent_by_dimension"], reverse=True)),
    ]
    readers = [
        [LATENTS.get(name, name), *(cell(row[key], form) for key, form in BITS.values())]
        for name, row in diagnosis["decoder"]["with_latents"].items()
    ]
    near = [f"  {row['chunk']!r}: {', '.join(map(repr, row['nearest']))}" for row in diagnosis["neighbours"]]
    return [
        "\n".join(head),
        "What the decoder makes of right and wrong latents, in bits per character:",
        Table(["the decoder reads", *BITS], readers),
        "What latents cost at each noise level, in bits per character; log SNR: above 0 there is more signal:",
        Table.of_records(diagnosis["latent_by_level"], BY_LEVEL),
        "How much noise on its latents the decoder bears:",
        Table.of_records(diagnosis["decoder"]["against_noise"], AGAINST_NOISE),
        "What bytes cost by their place in the chunk, given the latent; its end counts as a byte:",
        Table.of_records(diagnosis["by_place"], BY_PLACE),
        "\n".join(["Chunks, and those whose latents are nearest:", *near]),
    ]
