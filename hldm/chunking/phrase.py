"""`phrase`: chunks begin where a speaker would pause, foretold from text that pauses were taken out of."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hldm.chunking.segmenter import Segmenter, SegmenterState

MARKS = b'.,;:!?()"\n\r'  # what writing has for a pause, in ASCII
WHITE = b" \t\n\r"
WITHIN = b"'-_"  # beside letters and digits, what does not end a word
BLANK = 0  # the byte that is read in place of a mark


class Gaps(NamedTuple):
    """What lies between words, byte by byte."""

    inside: Tensor  # (b t) bool
    first: Tensor  # (b t) long, the byte that the gap of a byte begins with, here or before
    turns: Tensor  # (b t) bool, the first white space of a gap


class PhraseSegmenter(Segmenter):
    """p(a mark of a pause comes before the next word | the text before, its marks read as blanks).

    It is asked where a gap between words begins, and answers at the gap's first white space, so that a chunk takes that
    along. Elsewhere the signal is lower, p - 1: text without spaces is cut there.
    """

    carried = 3  # of the last byte: is it in a gap, p where that began, has that had white space

    def build(self) -> None:
        width = self.settings.width
        self.pause = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        of_byte = torch.tensor(
            [[byte in MARKS, byte in WHITE, byte < 128 and not _in_word(byte)] for byte in range(256)]
        )
        self.register_buffer("of_byte", of_byte, persistent=False)

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        features, after = self.read(self.heard(text), doc_start, state)
        p = self.pause(features.before)[..., 0].sigmoid()
        gaps = self.gaps(text, doc_start, state)
        p_carried = torch.cat([state.carry[:, 1:2], p], dim=1)
        at_start = p_carried.gather(1, gaps.first)
        signal = torch.where(gaps.turns, at_start, torch.cat([state.carry[:, 1:2], p - 1], dim=1))
        white = torch.cat([state.carry[:, 2:] > 0, self.of_byte[text, 1]], dim=1)
        since = white.cumsum(1)
        seen = since[:, -1] > (since - white.long()).gather(1, gaps.first[:, -1:])[:, 0]
        last = torch.stack([gaps.inside[:, -1].to(p), at_start[:, -1], seen.to(p)], dim=1)
        return signal[:, 1:, None], after._replace(carry=last)

    def loss(
        self, text: Tensor, doc_start: Tensor, state: SegmenterState, progress: float, generator: Generator
    ) -> tuple[Tensor, SegmenterState]:
        features, after = self.read(self.heard(text), doc_start, state)
        gaps = self.gaps(text, doc_start, state)
        after = after._replace(carry=F.pad(gaps.inside[:, -1:].to(features.after), (0, 2)))
        opens, pauses = self.pauses(text, gaps)
        nats = F.binary_cross_entropy_with_logits(
            self.pause(features.before)[..., 0], pauses.to(features.before), reduction="none"
        )
        return self.next_byte_nats(features, text).mean() + (nats * opens).sum() / opens.sum().clamp(
            min=1
        ), after

    def heard(self, text: Tensor) -> Tensor:
        """The text as it is read: marks are blanks."""
        return text.masked_fill(self.of_byte[text, 0], BLANK)

    def gaps(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> Gaps:
        """Of the last byte before, then of the text. (b 1+t)."""
        inside = torch.cat([state.carry[:, :1] > 0, self.of_byte[text, 2]], dim=1)
        white = torch.cat([state.carry[:, 2:] > 0, self.of_byte[text, 1]], dim=1)
        opens = F.pad(doc_start, (1, 0)) | ~F.pad(inside[:, :-1], (1, 0))
        place = torch.arange(inside.shape[1], device=text.device).expand_as(inside)
        first = torch.where(inside & opens, place, 0).cummax(dim=1).values
        earlier = white.cumsum(1) - white.long()
        return Gaps(inside, first, inside & white & (earlier == earlier.gather(1, first)))

    def pauses(self, text: Tensor, gaps: Gaps) -> tuple[Tensor, Tensor]:
        """(b t) bool twice: gaps that begin here and end in this window; those of them that hold a mark."""
        place = torch.arange(gaps.inside.shape[1], device=text.device)
        opens = gaps.inside & (gaps.first == place)
        marks = F.pad(self.of_byte[text, 0], (1, 0))
        of_gap = torch.zeros_like(gaps.first).scatter_add_(1, gaps.first, (marks & gaps.inside).long())
        is_open = gaps.inside[:, -1:] & (gaps.first[:, -1:] == place)  # a window ends in it
        return (opens & ~is_open)[:, 1:], (of_gap > 0)[:, 1:]


def _in_word(byte: int) -> bool:
    return chr(byte).isalnum() or byte in WITHIN
