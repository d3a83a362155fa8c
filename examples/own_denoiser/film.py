"""A denoiser without attention: the context's summary scales and shifts the features of the noisy latent (FiLM).

    hldm train-diffusion --config CONFIG --name NAME prior.denoiser=film:FilmDenoiser

Perez et al., FiLM (arXiv 1709.07871). What is far away reaches it by way of the summary alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hldm.config import HierarchyConfig, PriorConfig
from hldm.model.contextualiser import Context


class FilmDenoiser(nn.Module):
    """(z_gamma, gamma, context) -> the correction of the mixture's estimate, zero at initialisation."""

    def __init__(self, config: PriorConfig, hierarchy: HierarchyConfig, latent_dim: int) -> None:
        super().__init__()
        d = config.width
        self.inputs = nn.Linear(2 * latent_dim + 2, d)
        self.film = nn.Linear(config.width, 2 * d)
        self.hidden = nn.Linear(d, d)
        self.outputs = nn.Linear(d, latent_dim)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)

    def read(self, context: Context) -> Tensor:
        """(b n 1 2d) scale and shift: the same for every draw and step."""
        return self.film(context.summary)[:, :, None]

    def forward(self, z: Tensor, gamma: Tensor, conditioning: Tensor, estimate: Tensor) -> Tensor:
        """z, estimate: (b n m z); gamma: (b n m). Returns (b n m z)."""
        level = torch.stack(
            [gamma / 5, torch.sigmoid(gamma)], dim=-1
        )  # (b n m 2); gamma runs from about -5 to 5
        x = F.gelu(self.inputs(torch.cat([z, estimate, level], dim=-1)))
        scale, shift = conditioning.chunk(2, dim=-1)
        x = x + F.gelu(self.hidden(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift))
        return self.outputs(F.layer_norm(x, x.shape[-1:]))
