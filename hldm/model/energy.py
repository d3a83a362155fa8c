"""A head that draws the next latent in one step, and the score that it learns from.

    y = b + f(b, context),   b from what is known already: the mixture, or N(0, I) without one

The energy score (Gneiting and Raftery 2007; the loss of CALM, arXiv 2510.27688) is least on average for samples of
the true distribution, and needs samples alone, no density. So a network may make them in any way it likes,
as here in a single pass. It is no likelihood, and so no part of the bound.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hldm.config import EnergyConfig
from hldm.model.contextualiser import Context


def energy_score(samples: Tensor, targets: Tensor, exponent: float = 1.0) -> Tensor:
    """2/(NM) sum_ij |x_i - y_j|^beta - 1/(N(N-1)) sum_(j != k) |y_j - y_k|^beta, Euclidean.

    samples: (... N z) y, N at least 2;  targets: (... M z) x, draws from one and the same distribution;
    exponent: beta in (0, 2). Unbiased in both. Returns (...).
    """
    first, second = torch.triu_indices(samples.shape[-2], samples.shape[-2], offset=1, device=samples.device)
    away = torch.linalg.vector_norm(samples.unsqueeze(-2) - targets.unsqueeze(-3), dim=-1)  # (... N M)
    apart = torch.linalg.vector_norm(samples[..., first, :] - samples[..., second, :], dim=-1)  # (... pairs)
    return 2 * _power(away, exponent).mean(dim=(-2, -1)) - _power(apart, exponent).mean(dim=-1)


def _power(distance: Tensor, exponent: float) -> Tensor:
    """distance^exponent; where two points meet its slope may be infinite, and counts as 0."""
    return distance.clamp(min=torch.finfo(distance.dtype).tiny).pow(exponent)


class EnergyHead(nn.Module):
    """Moves draws of the base distribution to where the context says that the next latent is."""

    def __init__(self, config: EnergyConfig, latent_dim: int, context_dim: int):
        """context_dim: of the context's summary and feature together."""
        super().__init__()
        d = config.width
        self.norm = nn.LayerNorm(context_dim)
        self.from_context = nn.Linear(context_dim, 2 * d * config.layers)  # a shift and a scale a block
        self.inputs = nn.Linear(latent_dim, d)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)) for _ in range(config.layers)
        )
        self.outputs = nn.Linear(d, latent_dim)
        for linear in (self.from_context, self.outputs):  # at first samples are those of the base
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, base: Tensor, context: Context) -> Tensor:
        """base, z_0: (b n m z); what depends on the context alone is shared by the m samples."""
        d = self.inputs.out_features
        known = self.norm(torch.cat([context.summary, context.feature], dim=-1))
        told = self.from_context(known)[:, :, None].split(2 * d, dim=-1)  # of (b n 1 2d)
        x = self.inputs(base)
        for block, shift_scale in zip(self.blocks, told, strict=True):
            shift, scale = shift_scale.chunk(2, dim=-1)
            x = x + block(F.layer_norm(x, (d,)) * (1 + scale) + shift)
        return base + self.outputs(F.layer_norm(x, (d,)))
