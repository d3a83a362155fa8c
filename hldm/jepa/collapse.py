"""Against collapse, and how it shows: terms that spread vectors out, and figures that say whether they are spread.

VICReg (arXiv 2105.04906, equations 1 to 4), SIGReg (LeJEPA, arXiv 2511.08544, section 4), the effective rank of Roy
and Vetterli 2007.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hldm.model.vitals import effective_rank

VARIANCE_EPS = 1e-4  # VICReg, equation 1
KNOTS, LAST_KNOT, SLICES = 17, 3.0, 256  # LeJEPA: of the integral, and random directions
LEAST_OF_A_KIND = 8  # vectors whose mean is a regression, and not what they are themselves
RANK_SHARE = 0.5  # of the untrained encoder's rank; below it a run has collapsed
SKILL = 0.05  # R^2 below which a predictor predicts nothing


def gathered(vectors: Tensor, mask: Tensor) -> Tensor:
    """The masked vectors (k z) of the global batch, from this rank's (b n z) and (b n); others' carry no gradient."""
    if not (dist.is_available() and dist.is_initialized()):
        return vectors[mask]
    ranks, own = dist.get_world_size(), dist.get_rank()
    parts = [torch.empty_like(vectors) for _ in range(ranks)]
    masks = [torch.empty_like(mask) for _ in range(ranks)]
    dist.all_gather(parts, vectors.detach().contiguous())
    dist.all_gather(masks, mask.contiguous())
    parts[own] = vectors
    return torch.cat([part[kept] for part, kept in zip(parts, masks, strict=True)])


def variance_hinge(vectors: Tensor) -> Tensor:
    """Mean over dimensions of max(0, 1 - deviation), of vectors (k z)."""
    return F.relu(1 - (vectors.var(dim=0) + VARIANCE_EPS).sqrt()).mean()


def squared_covariances(vectors: Tensor) -> Tensor:
    """Sum of the squared covariances of different dimensions over z, of vectors (k z)."""
    covariance = torch.cov(vectors.T)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / vectors.shape[1]


def sigreg(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Epps and Pulley's distance of random projections of vectors (k z) from a standard normal, their mean.

    k times the integral over u of |phi_k(u) - exp(-u^2/2)|^2 exp(-u^2/2), phi_k the characteristic function.
    """
    directions = torch.randn(vectors.shape[1], SLICES, generator=generator).to(vectors)
    directions = directions / directions.norm(dim=0)
    knots = torch.linspace(0, LAST_KNOT, KNOTS, device=vectors.device)
    normal = (-knots.square() / 2).exp()
    width = torch.full_like(knots, 2 * LAST_KNOT / (KNOTS - 1))  # 2: both signs of u
    width[[0, -1]] /= 2
    angle = (vectors @ directions)[..., None] * knots  # (k slices knots)
    error = (angle.cos().mean(dim=0) - normal).square() + angle.sin().mean(dim=0).square()
    return (error @ (width * normal)).mean() * len(vectors)


def spread(vectors: Tensor) -> dict[str, float]:
    """Effective rank of vectors (k z), the least deviation over their RMS, and their mean pairwise cosine."""
    vectors = vectors.detach().double()
    size = vectors.square().mean().sqrt().clamp(min=1e-300)
    unit = F.normalize(vectors, dim=-1)
    k = len(vectors)
    cosine = (unit.sum(dim=0).square().sum() - unit.square().sum()) / max(k * (k - 1), 1)
    return {
        "rank": effective_rank(vectors),
        "least_deviation": float(vectors.std(dim=0).min() / size),
        "mean_cosine": float(cosine),
    }


class Skill(NamedTuple):
    """How well predictions (k z) fit targets (k z) of held-out chunks."""

    r2: float  # 1 - squared error over that of the targets' mean
    r2_beyond_length: float  # the same of what is left of both after a regression on the chunks' lengths
    shuffle_gap: float  # centred cosine with the right target less that with another chunk's


def skill(predicted: Tensor, target: Tensor, kind: Tensor) -> Skill:
    """kind: (k) int64, what can be seen from outside: the length of each chunk."""
    predicted, target = predicted.detach().double(), target.detach().double()
    mean = target.mean(dim=0)
    # beyond length: of what is left of targets and predictions after the mean of each length
    kind, number = kind + 1, int(kind.max()) + 2
    # those too rare for a mean share one
    kind = kind.masked_fill(torch.bincount(kind, minlength=number)[kind] < LEAST_OF_A_KIND, 0)
    size = torch.bincount(kind, minlength=number).clamp(min=1)[:, None]

    def left(vectors: Tensor) -> Tensor:
        sums = vectors.new_zeros(number, vectors.shape[1]).index_add(0, kind, vectors)
        return vectors - (sums / size)[kind]

    def explained(guess: Tensor, truth: Tensor) -> float:
        return float(1 - (truth - guess).square().sum() / truth.square().sum().clamp(min=1e-300))

    centred, goal = predicted - predicted.mean(dim=0), target - mean
    right = F.cosine_similarity(centred, goal).mean()
    wrong = F.cosine_similarity(centred, goal.roll(len(goal) // 2, dims=0)).mean()
    return Skill(
        explained(predicted - mean, target - mean),
        explained(left(predicted), left(target)),
        float(right - wrong),
    )


def complaints(signs: dict[str, float]) -> dict[str, str]:
    """What has collapsed, by the sign that says so: a line each, with what to do."""
    said = {}
    rank, untrained = signs.get("rank", math.inf), signs.get("untrained_rank", 0.0)
    if rank < RANK_SHARE * untrained:
        said["rank"] = (
            f"collapse: effective rank {rank:.1f} is below half of the untrained encoder's {untrained:.1f}; raise "
            "objective.variance and covariance or objective.momentum, or lower the learning rate"
        )
    if signs.get("r2_beyond_length", math.inf) < SKILL:
        said["r2_beyond_length"] = (
            f"R2 beyond the length of a chunk is {signs['r2_beyond_length']:.2f}: the predictor is decoration so far"
        )
    return said
