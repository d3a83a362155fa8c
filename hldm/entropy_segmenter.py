"""`entropy`: chunks begin where the next byte is hard to foresee (BLT, arXiv 2412.09871, section 2.3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from hldm.segmenter import Segmenter, SegmenterState


class EntropySegmenter(Segmenter):
    """H(x_t | x_<t), bits, of the segmenter's own prediction.

    "threshold": a border where it is high;  "rise": where it is so much higher than a byte before;
    BLT's two forms. "budget" sums what bytes cost, -log2 p(x_t | x_<t): a border where those after the open
    chunk's first come to a quota. The signal is then all that was spent so far, its movement what a chunk cost.
    """

    def build(self) -> None:
        self.rule = "movement" if self.chunking.entropy_form == "budget" else "level"

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        features, after = self.read(text, doc_start, state)
        log_p = self.outputs(features.before).log_softmax(dim=-1)  # (b t v)
        signal, carry = entropy_signal(log_p, text, self.chunking.entropy_form, state.carry)
        return signal, after._replace(carry=carry)


def entropy_signal(
    log_p: Tensor, text: Tensor, form: Literal["threshold", "rise", "budget"], carry: Tensor
) -> tuple[Tensor, Tensor]:
    """A form's signal (b t 1) and what it carries on (b 1).

    log_p: (b t v) nats of each byte, from those before it;  carry: (b 1) as it came from the bytes before
    """
    log_p = log_p / math.log(2)
    if form == "budget":
        spent = -log_p.gather(2, text[..., None])[..., 0].cumsum(dim=1) + carry
        return spent[..., None], spent[:, -1:]
    entropy = -(log_p.exp2() * log_p).sum(dim=-1)
    if form == "rise":
        return (entropy - torch.cat([carry, entropy[:, :-1]], dim=1))[..., None], entropy[:, -1:]
    return entropy[..., None], carry
