"""What the decoder writes for a window of bytes, in order, and where its chunks lie.

Bytes and the end of each unit in one row of events: plain index arithmetic, no model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hldm.model.ops import softmax_nats
from hldm.text.bytes import END_OF_CHUNK, END_OF_DOCUMENT, START


class Events(NamedTuple):
    """What the decoder writes for a window, in order: the bytes of each unit, then its end.

    A unit is a chunk; for the twin, a document. The t' events of a row number bytes + ends.
    """

    target: Tensor  # (b t') symbol to emit
    symbol: Tensor  # (b t') symbol read: START at the first event of a unit, else the byte before
    chunk: Tensor  # (b t') number of the chunk in the window
    length: Tensor  # (b) events of each row
    doc_start: Tensor  # (b t') first event of a document
    unit_start: Tensor  # (b t') first event of a unit: attention sees no further back
    bytes_before: Tensor  # (b t') how many bytes of the window come before the event
    last: Tensor  # (b) the symbol that the next window continues from

    @property
    def mask(self) -> Tensor:
        """(b t') bool: real events."""
        return torch.arange(self.target.shape[1], device=self.length.device) < self.length[:, None]


def place_in_chunk(chunk_start: Tensor) -> Tensor:
    """How many positions after its chunk's start each one is. (b t) bool -> (b t)."""
    index = torch.arange(chunk_start.shape[1], device=chunk_start.device).expand_as(chunk_start)
    return index - torch.where(chunk_start, index, 0).cummax(dim=1).values


def ends_of(chunk_start: Tensor, length: Tensor) -> Tensor:
    """Last bytes of chunks: where the next one starts, or the window, which holds whole chunks, ends. (b t)."""
    ends = torch.cat([chunk_start[:, 1:], chunk_start.new_zeros(chunk_start.shape[0], 1)], dim=1)
    return ends | (torch.arange(ends.shape[1], device=ends.device) == length[:, None] - 1)


def positions(flags: Tensor, count: int) -> Tensor:
    """Where the first `count` flags of each row are set; anywhere beyond them. (b t) bool -> (b count)."""
    return (~flags).to(torch.int8).argsort(dim=1, stable=True)[:, :count]


def decoder_events(
    text: Tensor,
    length: Tensor,
    unit_start: Tensor,
    unit_end: Tensor,
    doc_start: Tensor,
    doc_end: Tensor,
    chunk_start: Tensor,
    previous: Tensor,
) -> Events:
    """Lay out what the decoder reads and writes for a window of bytes.

    text (b t), the flags (b t) bool, previous (b): symbol before the window.
    Byte t sits at event t + (units ended before t); the end of its unit right after it.
    """
    b, t = text.shape
    real = torch.arange(t, device=text.device) < length[:, None]
    ends = (unit_end & real).long()
    ended_before = ends.cumsum(dim=1) - ends
    at = torch.arange(t, device=text.device) + ended_before
    total = length + ends.sum(dim=1)
    size = int(total.max()) if b and t else 0

    def lay(byte_values: Tensor, end_values: Tensor) -> Tensor:
        """Scatter what belongs to bytes and to ends; padding lands in a spare column, cut off."""
        out = byte_values.new_zeros(b, size + 1)
        out.scatter_(1, torch.where(real, at, size), byte_values)
        out[:, size] = 0
        out.scatter_(1, torch.where(ends.bool(), at + 1, size), end_values)
        return out[:, :size]

    before = torch.cat([previous[:, None], text[:, :-1]], dim=1)
    none = torch.zeros_like(real)
    chunk = (chunk_start & real).long().cumsum(dim=1) - 1
    chunk = chunk.clamp(min=0)  # the twin's window may open inside a chunk
    last = text.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0] if t else previous
    return Events(
        target=lay(text, torch.where(doc_end, END_OF_DOCUMENT, END_OF_CHUNK)),
        symbol=lay(torch.where(unit_start, START, before), text),
        chunk=lay(chunk, chunk),
        length=total,
        doc_start=lay(doc_start & real, none),
        unit_start=lay(unit_start & real, none),
        bytes_before=lay(*(torch.arange(t, device=text.device).expand(b, t) + k for k in (0, 1))),
        last=torch.where(length > 0, last, previous),
    )


def symbol_nats(logits: Tensor, events: Events) -> Tensor:
    """-log p of each event's target in nats, 0 where padded. (b t' 258) -> (b t')."""
    nats = softmax_nats(logits.float().flatten(0, 1), events.target.flatten())
    return nats.view_as(events.target) * events.mask


def sum_by_chunk(values: Tensor, events: Events, chunks: int) -> Tensor:
    """Sum over the events of each chunk. (b t') -> (b n)."""
    return values.new_zeros(values.shape[0], chunks).scatter_add(1, events.chunk, values)
