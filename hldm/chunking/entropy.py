"""`entropy`: chunks begin where the next byte is hard to foresee (BLT, arXiv 2412.09871, section 2.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hldm.chunking.segmenter import Segmenter


class EntropySegmenter(Segmenter):
    """H(x_t | x_<t), bits, of the segmenter's own prediction: a border where it is high."""

    def level(self, before: Tensor) -> Tensor:
        log_p = self.outputs(before).log_softmax(dim=-1)
        return (torch.linalg.vecdot(log_p.exp(), log_p) / -math.log(2))[..., None]
