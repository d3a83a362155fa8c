"""An index over the chunks of a document: mean-pooled blocks of r, r^2, ... of them choose which are read in full.

A query descends. Of the largest blocks the `beam` whose means are most like it are opened. Of the blocks inside, and of
those that no larger block holds yet, again the `beam` most like it, and so on down to single chunks. Found are those
chunks, the ones that are in no block yet, and the NEAREST; which of them are like the query, the caller asks. In a
document of n chunks that takes about n / r^L + beam r L comparisons instead of n. Attention that selects blocks of keys
does the same with one level (arXiv 2502.11089).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hldm.config import HierarchyConfig

NEAREST = 24  # chunks that are always found
BEAM = 64  # blocks of each level that are opened: 96 % of what comparing all chunks saves (docs/parts.md)
NONE = -1  # in place of a chunk


class Index(NamedTuple):
    """How a document's chunks are searched."""

    ratio: int  # r
    levels: int  # L
    beam: int = BEAM  # 0: the NEAREST alone

    @classmethod
    def of(cls, hierarchy: HierarchyConfig) -> Index:
        """Over the blocks of a model's pyramid."""
        return cls(hierarchy.ratio, hierarchy.levels)


class Found(NamedTuple):
    """What a search came upon."""

    chunk: Tensor  # (k c) each of them once, NONE where there are fewer
    compared: Tensor  # (k) keys and means that were looked at


def pooled(keys: Tensor, index: Index) -> list[Tensor]:
    """Keys (n w), then the directions of the means of whole blocks of each level (n / r^l w), of length 1.

    A mean itself is shorter the less its keys are alike, so blocks of much the same would always be opened first.
    """
    levels, sums = [keys], keys
    for _ in range(index.levels):
        whole = len(sums) // index.ratio
        sums = sums[: whole * index.ratio].unflatten(0, (whole, index.ratio)).sum(dim=1)
        levels.append(F.normalize(sums, dim=-1))
    return levels


def search(levels: Sequence[Tensor], query: Tensor, written: Tensor, index: Index) -> Found:
    """Chunks to be compared with queries. levels: `pooled`; query: (k w); written: (k) chunks before each.

    Levels may hold more than was written: what came later is not looked at.
    """
    ratio, beam = index.ratio, index.beam
    nearest = written[:, None] - 1 - torch.arange(NEAREST)
    nearest = nearest.clamp(min=NONE)
    if not beam or not index.levels:
        return Found(nearest, (nearest != NONE).sum(dim=1))
    compared = torch.zeros_like(written)
    block = _from_to(torch.zeros_like(written), written // ratio**index.levels)
    for level in range(index.levels, 0, -1):
        means = levels[level] if len(levels[level]) else torch.zeros_like(query[:1])
        likeness = torch.einsum("kcw,kw->kc", means[block.clamp(min=0)], query)
        compared += (block != NONE).sum(dim=1)
        best = likeness.masked_fill(block == NONE, -torch.inf).topk(min(beam, block.shape[1]), dim=1).indices
        best = block.gather(1, best)
        inside = (best[..., None] * ratio + torch.arange(ratio)).masked_fill(best[..., None] == NONE, NONE)
        unit = ratio ** (level - 1)
        loose = _from_to(written // (unit * ratio) * ratio, written // unit)
        block = torch.cat([inside.flatten(1), loose], dim=1)
    far = block.masked_fill(block >= written[:, None] - NEAREST, NONE)
    chunk = torch.cat([nearest, far], dim=1)
    return Found(chunk, compared + (chunk != NONE).sum(dim=1))


def _from_to(begin: Tensor, end: Tensor) -> Tensor:
    """begin .. end - 1 of each row (k), filled up with NONE. (k c), c at least 1."""
    size = max(int((end - begin).max()), 1)
    found = begin[:, None] + torch.arange(size)
    return found.masked_fill(found >= end[:, None], NONE)


class Growing:
    """`pooled` keys of a document that is being written, one more at a time."""

    def __init__(self, width: int, index: Index):
        self.index = index
        self._rooms = [torch.zeros(64, width) for _ in range(index.levels + 1)]
        self._sums = torch.zeros(index.levels, width)  # of the block of each level that is open
        self._sizes = [0] * (index.levels + 1)

    def add(self, key: Tensor) -> None:
        """Take in the key of the next chunk (w)."""
        for level in range(self.index.levels + 1):
            size = self._sizes[level]
            if size == len(self._rooms[level]):
                self._rooms[level] = torch.cat([self._rooms[level], torch.zeros_like(self._rooms[level])])
            self._rooms[level][size] = key if level == 0 else F.normalize(key, dim=-1)
            self._sizes[level] = size + 1
            if level == self.index.levels:
                return
            self._sums[level] += key
            if (size + 1) % self.index.ratio:
                return
            key = self._sums[level].clone()
            self._sums[level] = 0

    def search(self, query: Tensor) -> Found:
        """For one query (1 w)."""
        levels = [room[: max(size, 1)] for room, size in zip(self._rooms, self._sizes, strict=True)]
        return search(levels, query, torch.tensor([self._sizes[0]]), self.index)
