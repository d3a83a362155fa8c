"""What a chunk costs on its own: a small decoder that knows nothing from before the chunk it is in.

Segmenters that learn where to cut minimise its bits: where a cut costs little, what came before is little needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hldm.model.griffin import RMSNorm
from hldm.model.ops import linear_scan

OPENING = 256  # the symbol before a chunk's first byte
LAYERS = 2


class _ResettingLayer(nn.Module):
    """x + o(h), h_t = a_t keep_t h_{t-1} + (1 - a_t) v_t, then an MLP; no other memory could cross a border."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.gate_and_value = nn.Linear(width, 2 * width)
        self.linear_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        nn.init.constant_(self.gate_and_value.bias[:width], 2.0)  # a of 0.88: some eight bytes

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        gate, value = self.gate_and_value(self.norm(x)).chunk(2, dim=-1)
        a = gate.sigmoid()
        h, _ = linear_scan(a * keep, (1 - a) * value)
        x = x + self.linear_out(h)
        return x + self.mlp(self.mlp_norm(x))


class ChunkWriter(nn.Module):
    """-ln p(byte | bytes before it in its chunk), differentiable in where chunks start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(OPENING + 1, width)
        nn.init.normal_(self.embed.weight, std=0.5)
        self.layers = nn.ModuleList(_ResettingLayer(width) for _ in range(LAYERS))
        self.outputs = nn.Linear(width, 256)

    def forward(self, text: Tensor, start: Tensor) -> Tensor:
        """Nats of text (b t) when chunks start where start (b t) is 1, or start to that extent. (b t)."""
        start = torch.cat([torch.ones_like(start[:, :1]), start[:, 1:]], dim=1)[..., None]
        before = self.embed(F.pad(text[:, :-1], (1, 0), value=OPENING))  # (b t d)
        x = before * (1 - start) + self.embed.weight[OPENING] * start
        for layer in self.layers:
            x = layer(x, 1 - start)
        return F.cross_entropy(self.outputs(x).mT, text, reduction="none")
