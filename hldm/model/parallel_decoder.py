"""A decoder that writes all bytes of a chunk at once: first how many, then every one of them.

    p(chunk | z, past) = p(length, document ends | z, past) prod_k p(byte_k | k, length, z, past)

A likelihood like the other's, so the bound stays one. Bytes are independent once latent and length are known (as in
translation, Gu et al., arXiv 1711.02281): what they have in common, the latent must say. Scores the same events
(hldm.text.events): a byte's event asks for the byte, the event that ends a chunk for its length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hldm.config import GriffinConfig
from hldm.model.griffin import GatedMLP, RMSNorm
from hldm.model.ops import at_least_float32
from hldm.text.events import ends_of

BYTES, ENDS = 256, 2


class Grid(NamedTuple):
    """The k chunks of a window, one a row, its e events at their places; padded."""

    at: Tensor  # (k e) event at each place, counted through the window's rows
    back: Tensor  # (b t') place of each event, counted through the grid's rows
    sees: Tensor  # (k 1 e e) bool: bytes see those of their chunk, the end nothing but itself
    length: Tensor  # (k) bytes of each chunk
    end: Tensor  # (k) event that ends it, counted as in `at`
    length_of: Tensor  # (b t') bytes of each event's chunk
    is_byte: Tensor  # (b t') bool: not an end

    @classmethod
    def of(cls, unit_start: Tensor, length: Tensor) -> Grid:
        """From the first events of chunks (b t') and the events of each row (b)."""
        b, t = unit_start.shape
        real = torch.arange(t, device=length.device) < length[:, None]
        start, is_end = (unit_start & real).flatten(), ends_of(unit_start, length) & real
        first, end = start.nonzero()[:, 0], is_end.flatten().nonzero()[:, 0]  # (k)
        size = end - first
        place = torch.arange(int(size.max()) + 1, device=length.device)
        chunk = (start.cumsum(0) - 1).clamp(min=0)  # padding belongs to whichever was last
        own = (torch.arange(b * t, device=length.device) - first[chunk]).clamp(0, len(place) - 1)
        is_byte = place < size[:, None]  # (k e)
        alone = torch.eye(len(place), dtype=torch.bool, device=length.device)
        sees = is_byte[:, :, None] & is_byte[:, None] | alone
        return cls(
            at=(first[:, None] + place).clamp(max=b * t - 1),
            back=(chunk * len(place) + own).view(b, t),
            sees=sees[:, None],
            length=size,
            end=end,
            length_of=size[chunk].view(b, t),
            is_byte=~is_end,
        )


class _Block(nn.Module):
    """x + attention(norm(x)) over the bytes of the chunk, in both directions, then x + mlp(norm(x))."""

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.norm, self.mlp_norm = RMSNorm(d), RMSNorm(d)
        self.query_key_value = nn.Linear(d, 3 * d, bias=False)
        self.linear_out = nn.Linear(d, d)
        self.mlp = GatedMLP(d, round(d * config.mlp_ratio), out_variance=2 / len(config.blocks))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        qkv = self.query_key_value(self.norm(x)).flatten(0, 1)
        qkv = qkv.index_select(0, grid.at.flatten()).unflatten(0, grid.at.shape)  # (k e 3d)
        q, k, v = rearrange(qkv, "k e (three h c) -> three k h e c", three=3, h=self.heads)
        y = rearrange(F.scaled_dot_product_attention(q, k, v, grid.sees), "k h e c -> (k e) (h c)")
        x = x + self.dropout(self.linear_out(y.index_select(0, grid.back.flatten()).view_as(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class ParallelDecoder(nn.Module):
    """Logits of length and bytes, from what is known at each place of a chunk.

    gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: GriffinConfig, max_bytes: int) -> None:
        super().__init__()
        d = config.width
        self.gradient_checkpointing = False
        self.embed_length = nn.Embedding(max_bytes, d)
        self.blocks = nn.ModuleList(_Block(config) for _ in config.blocks)
        self.norm = RMSNorm(d)
        self.bytes = nn.Linear(d, BYTES)
        self.lengths = nn.Linear(
            d, ENDS * max_bytes
        )  # 1, 2, ... bytes, each without and with a document's end
        for readout in (self.bytes, self.lengths):
            nn.init.normal_(readout.weight, std=0.5 * d**-0.5)
            nn.init.zeros_(readout.bias)

    def forward(self, x: Tensor, unit_start: Tensor, length: Tensor) -> Tensor:
        """Logits of every event's symbol (b t' v), as those of a decoder that writes byte by byte.

        x: (b t' d) of latent, past and place, the end of a chunk having one place whatever its length
        unit_start: (b t') bool;  length: (b) events of each row
        At an end the two end symbols stand for the right length, and all others for the wrong ones: v = 258, or
        more where there are more lengths.
        """
        grid = Grid.of(unit_start, length)
        y = self._features(x, grid)
        lengths = at_least_float32(self.lengths(y.flatten(0, 1)[grid.end])).log_softmax(dim=-1)  # (k 2l)
        own = ENDS * (grid.length[:, None] - 1) + torch.arange(ENDS, device=x.device)
        right, wrong = lengths.gather(1, own), lengths.scatter(1, own, -torch.inf)
        wrong = F.pad(wrong, (0, max(BYTES - wrong.shape[1], 0)), value=-torch.inf)
        ends = torch.cat([wrong[:, :BYTES], right, wrong[:, BYTES:]], dim=1)  # (k v)
        logits = at_least_float32(self.bytes(y))
        logits = F.pad(logits, (0, ends.shape[1] - BYTES), value=-torch.inf)
        return logits.flatten(0, 1).index_copy(0, grid.end, ends).view_as(logits)

    def length_logits(self, x: Tensor) -> Tensor:
        """Of chunks of 1, 2, ... bytes, each without and with the document's end. x (b d) at the end: (b 2l)."""
        alone = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        return self.lengths(self._features(x[:, None], Grid.of(alone, alone.sum(dim=1)))[:, 0])

    def byte_logits(self, x: Tensor, length: Tensor) -> Tensor:
        """Of every byte of one chunk a row, x (b e d) at its places, e above its length (b). (b e 256)."""
        start = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        start[:, 0] = True
        return self.bytes(self._features(x, Grid.of(start, length + 1)))

    def _features(self, x: Tensor, grid: Grid) -> Tensor:
        """(b t' d) from the same. A byte knows the length, an end does not."""
        x = x + self.embed_length((grid.length_of - 1).clamp(min=0)) * grid.is_byte[..., None]
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        return self.norm(x)
