"""What a trained run's latents hold, what the prior pays for them and what the decoder does with them.

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

from hldm.config import load_config
from hldm.evaluation.bound import held_out_windows
from hldm.evaluation.context_length import by_distance
from hldm.evaluation.tables import Table
from hldm.generation.pipeline import read_pipeline
from hldm.model.autoencoder import Autoencoder
from hldm.model.contextualiser import Context
from hldm.model.decoder import Reading, noisy_latents, read_chunks
from hldm.model.diffusion import BINS, alpha_sigma, diffuse, sample, sampler_steps
from hldm.model.prior import Prior, price_latents
from hldm.model.state import DecoderState, Encoding
from hldm.text.corpus import Split, load_corpora
from hldm.text.windows import Batch, Windows, draw_normal

NOISE_LEVELS = 9  # points of the curve of accuracy against noise
ENOUGH_CHUNKS = 4000  # where a figure needs a pass of its own: a standard error of about 1 % of it
NEIGHBOURS, PROBES = 5, 12
SHOWN_BINS = 16  # of log SNR

# tables of the summary, head: key and format
Columns = Mapping[str, tuple[str, str]]
BITS: Columns = {"bits": ("bits", ".4f"), "symbols right": ("accuracy", ".2%")}
WITH_LATENTS: Columns = {"decoder with latents": ("name", ""), **BITS}
AGAINST_NOISE: Columns = {"decoder against noise, log SNR": ("log_snr", ".2f"), **BITS}
BY_LEVEL: Columns = {
    "log SNR": ("log_snr", ".2f"),
    "latent bits": ("bits", ".4f"),
    "mean square error": ("error", ".4f"),
}
BY_PLACE: Columns = {
    "place in the chunk": ("place", ""),
    "symbols": ("symbols", ",.0f"),
    "bits a symbol": ("bits", ".4f"),
}
BY_DISTANCE: Columns = {
    "bytes from the document's start": ("name", ""),
    "characters": ("characters", ",.0f"),
    "latent bits": ("latent", ".4f"),
    "decoder bits": ("decoder", ".4f"),
}


def diagnose_run(
    folder: Path, *, split: Split = "validation", draws: int = 8, seed: int = 0
) -> dict[str, Any]:
    """`diagnose` of a run folder's pipeline on held-out text of its data. Raises ValueError or OSError."""
    pipeline = read_pipeline(folder / "pipeline")
    if pipeline.prior is None:
        raise ValueError(f"{folder} is a twin: it has no latents to diagnose")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    autoencoder, prior = pipeline.autoencoder.eval(), pipeline.prior.eval()
    corpora = load_corpora(load_config(folder / "autoencoder" / "config.yaml").data)
    return {
        "run": folder.resolve().name,
        "split": split,
        **diagnose(autoencoder, prior, held_out_windows(autoencoder, corpora[split]), draws=draws, seed=seed),
    }


@torch.no_grad()
def diagnose(
    autoencoder: Autoencoder, prior: Prior, windows: Windows, *, draws: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Diagnose a latent model on Windows(..., shuffle=False), as JSON. All bits are per character.

    draws: noise levels a chunk.
    """
    device = next(autoencoder.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    rows = windows.lanes
    encoder, memory = autoencoder.encoder_state(rows, device), prior.initial_state(rows, device)
    decoder = autoencoder.decoder_state(rows, device)
    latents: list[Tensor] = []
    nats = np.zeros((2, windows.chunks))  # latent (diffusion and end terms), decoder; of every chunk
    terms = _Terms(prior)
    places = _Places(autoencoder.chunking.max_bytes + 1)
    readers = _Readers(autoencoder, prior, seed, rows)
    seen = 0
    for step in range(windows.windows_per_epoch):
        batch = windows.batch(step).to(device)
        encoding, encoder = autoencoder.encode(batch, encoder)
        context, memory = prior.contextualiser(
            encoding.latents, encoding.mask, encoding.doc_start, memory, encoding.after
        )
        paid = price_latents(prior, encoding, context, batch, generator, draws)
        z_0 = noisy_latents(encoding, prior.diffusion.gamma_0, batch, generator)
        before = decoder
        reading, decoder = read_chunks(autoencoder, batch, z_0, decoder, encoding)
        chunk = batch.chunk_index[encoding.mask].cpu().numpy()
        for total, term in zip(nats, (paid.latent + paid.end, reading.nats), strict=True):
            total[chunk] = term[encoding.mask].double().cpu().numpy()
        places.add(reading)
        latents.append(encoding.latents[encoding.mask])
        if seen < ENOUGH_CHUNKS:
            terms.add(encoding, context, batch, generator, draws)
            readers.add(encoding, context, batch, before)
        seen += len(chunk)
    latent, decoder_nats = nats
    characters = windows.characters
    mu = torch.cat(latents)
    return {
        "characters": characters,
        "chunks": seen,
        "characters_per_chunk": characters / seen,
        "bits_per_character": {
            "latent": float(latent.sum() / math.log(2) / characters),
            "decoder": float(decoder_nats.sum() / math.log(2) / characters),
        },
        "latents": _statistics(mu, prior),
        **terms.result(characters / seen),
        "decoder": readers.result(),
        "by_place": places.result(),
        "by_distance": bits_by_distance(latent, decoder_nats, windows),
        "neighbours": _neighbours(mu[:ENOUGH_CHUNKS], windows),
    }


def bits_by_distance(latent: np.ndarray, decoder: np.ndarray, windows: Windows) -> list[dict[str, float]]:
    """Bits per character in octaves of the distance from the document's start, in bytes; nats (chunks,) of either."""
    octaves = [0, *(2**k for k in range(6, int(np.diff(windows.corpus.offsets).max()).bit_length()))]
    one, other = (by_distance(nats, windows, octaves) for nats in (latent, decoder))
    return [
        {
            "from": first,
            "to": 2 * first or 64,
            "characters": near["characters"],
            "latent": near["bits_per_character"],
            "decoder": far["bits_per_character"],
        }
        for first in octaves
        if (near := one[str(first)]) and (far := other[str(first)])
    ]


def _statistics(mu: Tensor, prior: Prior) -> dict[str, Any]:
    """Deviation, effective rank and capacity of latents mu (k z).

    effective rank: exp of the entropy of the covariance's normalised eigenvalues (Roy and Vetterli 2007);
    capacity: sum of 0.5 log2(1 + SNR_0 variance) over the covariance's eigenvalues, the most bits that
    z_0 can say of mu if mu were Gaussian.
    """
    covariance = torch.cov(mu.double().T).reshape(mu.shape[1], mu.shape[1])
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    share = eigenvalues / eigenvalues.sum()
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    snr = math.exp(-prior.diffusion.gamma_0)
    return {
        "deviation": mu.std(dim=0).tolist(),
        "mean": mu.mean(dim=0).tolist(),
        "effective_rank": float(entropy.exp()),
        "capacity_bits": float(0.5 * (1 + snr * eigenvalues).log2().sum()),
    }


class _Terms:
    """The diffusion term, by dimension and by noise level."""

    def __init__(self, prior: Prior):
        self.prior = prior
        self.by_dimension = torch.zeros(prior.latent_dim, dtype=torch.float64)
        self.by_level = torch.zeros(BINS, dtype=torch.float64)
        self.error = torch.zeros(BINS, dtype=torch.float64)  # ||x0 - x0_hat||^2 / z
        self.draws = torch.zeros(BINS, dtype=torch.float64)
        self.chunks = 0

    def add(
        self, encoding: Encoding, context: Context, batch: Batch, generator: torch.Generator, draws: int
    ) -> None:
        """gamma is drawn uniformly here: every level is to be seen, not only those that matter."""
        b, n, z = encoding.latents.shape
        low, high = self.prior.diffusion.gamma_0, self.prior.diffusion.gamma_1
        offset = torch.rand(b, n, 1, generator=generator)
        u = ((torch.arange(draws) + offset) / draws).to(encoding.latents.device)
        gamma = low + (high - low) * u
        noise = draw_normal(batch, (n, draws, z), generator)
        x0 = encoding.latents[:, :, None].expand_as(noise)
        x0_hat = self.prior.estimate(x0, gamma, noise, context.first(n))
        error = (x0 - x0_hat).square()[encoding.mask].double().cpu()  # (k m z)
        gamma = gamma[encoding.mask].cpu()
        cost = 0.5 * torch.exp(-gamma)[..., None] * error * (high - low) / draws
        self.by_dimension += cost.sum(dim=(0, 1))
        level = ((gamma - low) / (high - low) * BINS).long().clamp(0, BINS - 1).flatten()
        self.by_level.index_add_(0, level, cost.sum(dim=-1).flatten())
        self.error.index_add_(0, level, error.mean(dim=-1).flatten())
        self.draws.index_add_(0, level, torch.ones_like(level, dtype=torch.float64))
        self.chunks += len(gamma)

    def result(self, characters_per_chunk: float) -> dict[str, Any]:
        """Bits per character by dimension; by log-SNR bin with the mean square error a dimension."""
        unit = self.chunks * characters_per_chunk * math.log(2)
        low, high = self.prior.diffusion.gamma_0, self.prior.diffusion.gamma_1
        wide = BINS // SHOWN_BINS
        level = self.by_level.view(-1, wide).sum(dim=1)
        error = self.error.view(-1, wide).sum(dim=1) / self.draws.view(-1, wide).sum(dim=1)
        width = (high - low) / SHOWN_BINS
        return {
            "latent_by_dimension": (self.by_dimension / unit).tolist(),
            "latent_by_level": [
                {"log_snr": -(low + (k + 0.5) * width), "bits": float(bits), "error": float(e)}
                for k, (bits, e) in enumerate(zip(level / unit, error, strict=True))
            ],
        }


class _Places:
    """Decoder bits by how far into the chunk a symbol stands."""

    def __init__(self, places: int):
        self.nats = torch.zeros(places, dtype=torch.float64)
        self.count = torch.zeros(places, dtype=torch.float64)

    def add(self, reading: Reading) -> None:
        mask = reading.events.mask
        place = reading.events.place[mask].cpu()
        self.nats.index_add_(0, place, reading.symbol_nats[mask].double().cpu())
        self.count.index_add_(0, place, torch.ones_like(place, dtype=torch.float64))

    def result(self) -> list[dict[str, float]]:
        """Bits a symbol (bytes and ends) at each place that occurs."""
        return [
            {"place": k, "symbols": float(count), "bits": float(nats / count / math.log(2))}
            for k, (nats, count) in enumerate(zip(self.nats, self.count, strict=True))
            if count
        ]


class _Readers:
    """The same text read with several latents: what the decoder owes to the right one.

    Each variant starts a window with the state of a decoder that has read the right latents.
    """

    def __init__(self, autoencoder: Autoencoder, prior: Prior, seed: int, rows: int):
        self.autoencoder, self.prior = autoencoder, prior
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.sums: dict[str, np.ndarray] = {}  # nats, right symbols, symbols, characters
        gammas = torch.linspace(prior.diffusion.gamma_0 - 4, prior.diffusion.gamma_1, NOISE_LEVELS)
        self.gammas = [float(gamma) for gamma in gammas]

    def add(self, encoding: Encoding, context: Context, batch: Batch, state: DecoderState) -> None:
        """Read a window with every variant."""
        mu, mask = encoding.latents, encoding.mask
        gamma_0 = self.prior.diffusion.gamma_0
        noise = draw_normal(batch, mu.shape[1:], self.generator)
        order = torch.randperm(int(mask.sum()), generator=self.generator).to(mu.device)
        shuffled = mu.clone()
        shuffled[mask] = mu[mask][order]
        variants = {
            "own": self._noisy(mu, gamma_0, noise),
            "clean": mu * alpha_sigma(torch.tensor(gamma_0))[0].to(mu),
            "zero": self._noisy(torch.zeros_like(mu), gamma_0, noise),
            "shuffled": self._noisy(shuffled, gamma_0, noise),
            "other document": self._noisy(mu.roll(1, dims=0), gamma_0, noise),
            "sampled": self._sampled(mu, context),
        }
        for gamma in self.gammas:
            # the decoder expects the signal at alpha_0 whatever the noise: only the noise changes
            alpha, sigma = alpha_sigma(torch.tensor(gamma))
            scale = alpha_sigma(torch.tensor(gamma_0))[0] / alpha
            variants[f"gamma {gamma:.2f}"] = (scale * (alpha * mu + sigma * noise)).to(mu)
        characters = int(batch.characters)
        for name, z_0 in variants.items():
            reading, _ = read_chunks(self.autoencoder, batch, z_0, state, encoding)
            sums = (reading.nats.sum(), reading.correct.sum(), reading.events.mask.sum())
            found = np.array([*(float(x) for x in sums), characters])
            self.sums[name] = self.sums.get(name, np.zeros(4)) + found

    def _noisy(self, mu: Tensor, gamma: float, noise: Tensor) -> Tensor:
        return diffuse(mu, torch.full(mu.shape[:-1], gamma, device=mu.device), noise)

    def _sampled(self, mu: Tensor, context: Context) -> Tensor:
        """Latents drawn from the prior, given the true text before."""
        b, n, z = mu.shape
        told = self.prior.tell(context.first(n))

        def denoise(state: Tensor, gamma: Tensor) -> Tensor:
            return self.prior.denoise(state.view(b, n, 1, z), gamma.view(b, n, 1), told).view(b * n, z)

        seeds = torch.randint(2**62, (b * n,), generator=self.generator).tolist()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        plan = sampler_steps("ancestral", self.prior.schedule, 16)
        drawn = sample(denoise, (b * n, z), plan, generators, device=mu.device)
        return drawn.view(b, n, z)

    def result(self) -> dict[str, Any]:
        """Bits per character and share of likeliest symbols right, with each kind of latent."""
        table = {
            name: {"bits": nats / characters / math.log(2), "accuracy": right / symbols}
            for name, (nats, right, symbols, characters) in self.sums.items()
        }
        curve = [{"log_snr": -gamma, **table.pop(f"gamma {gamma:.2f}")} for gamma in self.gammas]
        return {"with_latents": table, "against_noise": curve}


def _neighbours(mu: Tensor, windows: Windows) -> list[dict[str, Any]]:
    """The nearest chunks with another text, by Euclidean distance, of a few chunks. mu: (k z)."""
    border = np.append(np.flatnonzero(windows.chunk_start), len(windows.corpus.text))
    # chunks in the order they were read: window by window, lane by lane
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
        f"bits per character: {bits['latent']:.4f} latent + {bits['decoder']:.4f} decoder",
        f"latents: effective rank {latents['effective_rank']:.1f} of {len(latents['deviation'])}, at most "
        f"{latents['capacity_bits'] / diagnosis['characters_per_chunk']:.3f} bits per character; by dimension "
        + " ".join(f"{x:.3f}" for x in sorted(diagnosis["latent_by_dimension"], reverse=True)),
    ]
    readers = [{"name": name, **row} for name, row in diagnosis["decoder"]["with_latents"].items()]
    distances = [{"name": f"{row['from']}..{row['to']}", **row} for row in diagnosis["by_distance"]]
    near = [f"  {row['chunk']!r}: {', '.join(map(repr, row['nearest']))}" for row in diagnosis["neighbours"]]
    return [
        "\n".join(head),
        Table.of_records(readers, WITH_LATENTS),
        Table.of_records(diagnosis["latent_by_level"], BY_LEVEL),
        Table.of_records(diagnosis["decoder"]["against_noise"], AGAINST_NOISE),
        Table.of_records(diagnosis["by_place"], BY_PLACE),
        Table.of_records(distances, BY_DISTANCE),
        "\n".join(["nearest chunks in latent space", *near]),
    ]
