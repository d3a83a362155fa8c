"""`entropy`: chunks begin where the next byte is hard to foresee (BLT, arXiv 2412.09871, section 2.3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from hldm.chunking.segmenter import Rule, Segmenter, SegmenterState

EntropyForm = Literal["threshold", "rise", "budget"]


class EntropySegmenter(Segmenter):
    """H(x_t | x_<t), bits, of the segmenter's own prediction.

    "threshold": a border where it is high;  "rise": where it is so much higher than a byte before;
    BLT's two forms. "budget" sums what bytes cost, -log2 p(x_t | x_<t): a border once those of the open chunk
    come to a quota. The signal is then all that was spent before a byte, its movement what the chunk cost.
    """

    @property
    def carried(self) -> int:
        """k: bits spent so far, and the last entropy."""
        return 2

    def build(self) -> None:
        self.rule = rule_of(self.chunking.entropy_form)

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        features, after = self.read(text, doc_start, state)
        log_p = self.outputs(features.before).log_softmax(dim=-1)  # (b t v)
        signal, carry = entropy_signal(log_p, text, self.chunking.entropy_form, state.carry)
        return signal, after._replace(carry=carry)


def rule_of(form: EntropyForm) -> Rule:
    """What makes a border of a form's signal."""
    return "movement" if form == "budget" else "level"


def entropy_signal(log_p: Tensor, text: Tensor, form: EntropyForm, carry: Tensor) -> tuple[Tensor, Tensor]:
    """A form's signal (b t 1) and what it carries on (b 2).

    log_p: (b t v) nats of each byte, from those before it;  carry: (b 2) as it came from the bytes before
    """
    cost = -log_p.gather(2, text[..., None])[..., 0] / math.log(2)  # (b t) bits
    spent = cost.cumsum(dim=1) + carry[:, :1]
    entropy = torch.linalg.vecdot(log_p.exp(), log_p) / -math.log(2)
    before = torch.cat([carry[:, 1:], entropy[:, :-1]], dim=1)
    signal = {"threshold": entropy, "rise": entropy - before, "budget": spent - cost}[form]
    return signal[..., None], torch.stack([spent[:, -1], entropy[:, -1]], dim=1)
