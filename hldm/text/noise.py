"""Random numbers that belong to places in a text, not to the order in which it is read.

Texts read with one seed share the noise of their first chunk, of their second, and so on. Whatever else is in the
batch, a text gets the same numbers, and the difference between two texts loses the noise that they share (common
random numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hldm.text.windows import Batch

BLOCK = 64  # places that share a generator: seeding one takes as long as drawing some thousand numbers


class PlacedGenerator(torch.Generator):
    """A generator for `draw_normal` and `draw_uniform` (hldm.text.windows) whose numbers depend on seed and place.

    The numbers of a place are one sequence for every batch: a batch that is drawn for again goes on in it.
    """

    def __new__(cls, seed: int, place: np.ndarray | None = None) -> PlacedGenerator:
        """A torch.Generator takes a device only."""
        return super().__new__(cls)

    def __init__(self, seed: int, place: np.ndarray | None = None):
        """place: (chunks,) int of each chunk of the corpus, any numbers; None: how many chunks come before it"""
        self.seed_of_all = seed
        self.place = place
        self._batch: Batch | None = None
        self._blocks: dict[int, torch.Generator] = {}

    def draw(self, random: Callable[..., Tensor], batch: Batch, shape: tuple[int, ...]) -> Tensor:
        """Numbers (b *shape) for the chunks of a batch. random: torch.randn or torch.rand; shape: (n ...)"""
        if batch is not self._batch:
            self._batch, self._blocks = batch, {}
        index = batch.chunk_index.cpu().numpy()  # (b n), -1 where there is no chunk
        place = np.where(index < 0, 0, index if self.place is None else self.place[index])
        block, row = np.divmod(place, BLOCK)
        blocks, which = np.unique(block, return_inverse=True)
        drawn = torch.stack([random(BLOCK, *shape[1:], generator=self._of(int(k))) for k in blocks])
        numbers = drawn[torch.from_numpy(which.reshape(block.shape)), torch.from_numpy(row)]
        return numbers.to(batch.bytes.device)

    def _of(self, block: int) -> torch.Generator:
        if block not in self._blocks:
            mixed = np.random.SeedSequence([self.seed_of_all, block % 2**64]).generate_state(1, np.uint64)
            self._blocks[block] = torch.Generator().manual_seed(int(mixed[0]))
        return self._blocks[block]
