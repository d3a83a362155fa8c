"""What a byte decoder is told of the chunks before its own: H-Net's chunk level (arXiv 2507.07955, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hldm.kernels.scan import linear_scan


class ChunkLevel(nn.Module):
    """States at chunk starts -> few numbers -> a recurrence over chunks -> smoothed, repeated, weighed by confidence.

    All of it at the places of bytes: between starts both recurrences hold, which repeats each chunk's vector
    (equation 8) and needs no list of chunks. Gradients reach the router by smoothing and confidence alone.
    """

    def __init__(self, width: int, numbers: int) -> None:
        super().__init__()
        self.gate_and_value = nn.Linear(width, 2 * numbers)
        self.linear_out = nn.Linear(numbers, width)

    def forward(self, states: Tensor, p: Tensor, start: Tensor) -> Tensor:
        """What is known at every byte of its chunk's start and those before. (b t d).

        states: (b t d) of the router's trunk;  p: (b t) probability of a start;  start: (b t) 1 where a chunk starts
        """
        opens, sure = start[..., None], p[..., None]
        gate, value = self.gate_and_value(states).chunk(2, dim=-1)
        new = opens * (1 - gate.sigmoid())
        z, _ = linear_scan(1 - new, new * value)  # (b t k)
        z, _ = linear_scan((1 - opens * sure).expand_as(z), opens * sure * z)  # equation 5
        confidence = torch.where(start > 0, p, 1 - p)[..., None]  # equation 6
        return self.linear_out(z * (confidence + (1 - confidence).detach()))  # equations 7 and 8
