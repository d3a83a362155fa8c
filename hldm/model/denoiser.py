"""The prior's second tower: an MLP with adaptive layer norm that attends to the context, once for each noise draw.

Adaptive layer norm as in DiT (arXiv 2212.09748); what depends on the context alone is worked out once and shared by
all draws and steps (MAR, arXiv 2406.11838).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hldm.config import HierarchyConfig, PriorConfig
from hldm.model.contextualiser import Context, RelativeBias


class BlockContext(NamedTuple):
    """What a block of the denoiser makes of the context: the same for every draw and every step."""

    shared: Tensor  # (b n 1 4d) shifts and scales of both halves
    gates: Tensor  # (b n 1 2d)
    key: Tensor  # (b h c e)
    value: Tensor  # (b h c e)
    bias: Tensor  # (b h n c) -inf at what is not visible


class DenoiserBlock(nn.Module):
    """Cross-attention and MLP under adaptive layer norm; one latent is one position."""

    def __init__(self, config: PriorConfig, hierarchy: HierarchyConfig, time_width: int):
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.query = nn.Linear(d, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.attended = nn.Linear(config.width, d)
        self.bias = RelativeBias(config.heads, hierarchy)
        self.mlp = nn.Sequential(nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))
        # Shift and scale of both halves, and their gates. What depends on the context alone is shared by the
        # draws; gates depend on it alone, which keeps the part that runs once a draw small.
        self.from_context = nn.Linear(config.width, 6 * d)
        self.from_gamma = nn.Linear(time_width, 4 * d, bias=False)
        for linear in (self.from_context, self.from_gamma):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.from_context.bias)

    def read(self, context: Context) -> BlockContext:
        """What `forward` needs of the context."""
        d = self.query.in_features
        shared, gates = self.from_context(context.summary)[:, :, None].split([4 * d, 2 * d], dim=-1)
        pairs = rearrange(self.key_value(context.memory), "b c (two h e) -> two b h c e", two=2, h=self.heads)
        bias = self.bias(context.level, context.distance)
        bias = bias.masked_fill(~context.visible[:, None], float("-inf"))
        return BlockContext(shared, gates, key=pairs[0], value=pairs[1], bias=bias)

    def forward(self, x: Tensor, time: Tensor, conditioning: BlockContext) -> Tensor:
        """x: (b n m d); time: (b n m e)."""
        m, d = x.shape[2:]
        shift_a, scale_a, shift_b, scale_b = (conditioning.shared + self.from_gamma(time)).chunk(4, dim=-1)
        gate_a, gate_b = conditioning.gates.chunk(2, dim=-1)
        y = F.layer_norm(x, (d,)) * (1 + scale_a) + shift_a
        # All draws of a chunk see the same entries: fold them into the query axis.
        query = rearrange(self.query(y), "b n m (h e) -> b h (n m) e", h=self.heads)
        bias = conditioning.bias if m == 1 else conditioning.bias.repeat_interleave(m, dim=2)
        y = F.scaled_dot_product_attention(query, conditioning.key, conditioning.value, attn_mask=bias)
        y = self.attended(rearrange(y, "b h (n m) e -> b n m (h e)", m=m))
        x = x + (1 + gate_a) * y
        y = F.layer_norm(x, (d,)) * (1 + scale_b) + shift_b
        return x + (1 + gate_b) * self.mlp(y)


class Denoiser(nn.Module):
    """(z_gamma, gamma, context) -> the regression target F, zero at initialisation."""

    frequencies: Tensor

    def __init__(self, config: PriorConfig, hierarchy: HierarchyConfig, latent_dim: int):
        super().__init__()
        d, time_width = config.width, 32
        self.inputs = nn.Linear(2 * latent_dim, d)
        # Periods from 40 (the whole range of log SNR) down to 0.5: smooth in gamma, yet resolving it.
        frequencies = 2 * math.pi / torch.logspace(math.log10(40), math.log10(0.5), time_width // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(time_width, time_width), nn.SiLU())
        self.blocks = nn.ModuleList(
            DenoiserBlock(config, hierarchy, time_width) for _ in range(config.denoiser_layers)
        )
        self.outputs = nn.Linear(d, latent_dim)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)

    def read(self, context: Context) -> tuple[BlockContext, ...]:
        """What `forward` needs of the context: as much again as a step, once for all of them."""
        return tuple(block.read(context) for block in cast("Iterable[DenoiserBlock]", self.blocks))

    def by_level(self, gamma: Tensor) -> Tensor:
        """Features of a noise level. (...) -> (... e)."""
        angle = gamma[..., None] * self.frequencies
        return self.time(torch.cat([angle.sin(), angle.cos()], dim=-1))

    def forward(
        self, z: Tensor, gamma: Tensor, conditioning: tuple[BlockContext, ...], estimate: Tensor
    ) -> Tensor:
        """z, estimate: (b n m z); gamma: (b n m). Returns (b n m z)."""
        time = self.by_level(gamma)
        x = self.inputs(torch.cat([z, estimate], dim=-1))
        for block, part in zip(self.blocks, conditioning, strict=True):
            x = block(x, time, part)
        return self.outputs(F.layer_norm(x, x.shape[-1:]))


class Conditioning(NamedTuple):
    """What denoising needs of a context, computed once for all draws and steps."""

    log_weights: Tensor | None  # (b n 1 k) of the mixture, if there is one
    blocks: tuple[BlockContext, ...]
