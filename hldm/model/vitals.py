"""Signs of life: what goes wrong without a word, because the bound stays finite and only gets worse.

A mixture whose weight is all on one prototype, latents that do not vary or vary along one line, a schedule that draws
one noise level: each has its figure here, and a line that says so. Training prints them, evaluation reports them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hldm.model.diffusion import Schedule

LEAST_CHUNKS = 32  # fewer say nothing of a covariance
DEVIATION = 0.1  # of standardised latents, whose deviation is 1; below it a dimension is dead
PROTOTYPES, RANK, SHARE = 1.5, 1.2, 0.8  # what counts as one prototype, one line, one noise level


def effective_rank(mu: Tensor) -> float:
    """exp of the entropy of the covariance's normalised eigenvalues (Roy and Vetterli 2007), of latents (k z)."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(mu.double().T).reshape(mu.shape[1], -1)).clamp(min=0)
    share = eigenvalues / eigenvalues.sum().clamp(min=1e-300)
    return float((-(share * share.clamp(min=1e-12).log()).sum()).exp())


def signs_of_latents(mu: Tensor) -> dict[str, float]:
    """Of latents mu (k z): `rank`, `dimensions`, and how many of them are dead. Nothing of too few, or of a nan."""
    if len(mu) < LEAST_CHUNKS or not bool(mu.isfinite().all()):
        return {}
    dead = float((mu.std(dim=0) < DEVIATION).sum())
    return {"rank": effective_rank(mu), "dimensions": mu.shape[1], "dead_dimensions": dead}


def signs_of_weights(log_weights: Tensor) -> dict[str, float]:
    """Of a mixture's log weights (n k) for n chunks: their mean entropy in bits, and how many prototypes are in use.

    In use: the perplexity of the mean weights. 1 is a dead mixture, a single normal whatever the text.
    """
    if len(log_weights) < LEAST_CHUNKS:
        return {}
    mean = log_weights.logsumexp(dim=0) - math.log(len(log_weights))
    return {
        "weights_bits": float(-(log_weights.exp() * log_weights).sum(dim=-1).mean()) / math.log(2),
        "prototypes": float((-(mean.exp() * mean).sum()).exp()),
    }


def signs_of_schedule(schedule: Schedule) -> dict[str, float]:
    """The largest share of noise levels that one bin of the schedule has."""
    return {"largest_bin": float(schedule.cdf.diff().max())}


def complaints(signs: Mapping[str, float]) -> dict[str, str]:
    """What is dead, by the sign that says so: a line each, with what to do."""
    said = {}
    dimensions, dead = signs.get("dimensions", 0), signs.get("dead_dimensions", 0)
    if signs.get("prototypes", math.inf) < PROTOTYPES:
        said["prototypes"] = (
            "the mixture has all of its weight on one prototype: the cost of latents is that of a single normal; lower "
            "the learning rate, or take fewer numbers a chunk (autoencoder.latent_dim)"
        )
    if dead and dead == dimensions:
        said["dead_dimensions"] = (
            "no dimension of the latents varies: they say nothing of the text; lower diffusion.gamma_0 (less noise) or "
            "autoencoder.rate_weight (cheaper latents)"
        )
    elif dead:
        said["dead_dimensions"] = f"{dead:.0f} of {dimensions:.0f} dimensions of the latents do not vary"
    elif dimensions > 1 and signs["rank"] < RANK:
        said["rank"] = f"latents vary along one line (effective rank {signs['rank']:.2f} of {dimensions:.0f})"
    if signs.get("largest_bin", 0) > SHARE:
        said["largest_bin"] = (
            f"{signs['largest_bin']:.0%} of the noise levels are drawn from one bin of the schedule: the denoiser "
            "fails there, or nowhere else has any error"
        )
    return said
