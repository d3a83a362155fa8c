"""What the decoder reads and writes for a window of bytes, in order.

Bytes and the end of each unit in one row of events: plain index arithmetic, no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hldm.text.bytes import END_OF_CHUNK, END_OF_DOCUMENT, START
from hldm.text.windows import Window, since_start


@dataclass(frozen=True, eq=False, kw_only=True)
class Events:
    """What the decoder reads and writes for a window, in order: the bytes of each unit, then its end.

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

    @cached_property
    def mask(self) -> Tensor:
        """(b t') bool: real events."""
        return torch.arange(self.target.shape[1], device=self.length.device) < self.length[:, None]

    @cached_property
    def place(self) -> Tensor:
        """(b t') events since the start of the unit."""
        return since_start(self.unit_start)


def decoder_events(window: Window, previous: Tensor, by_document: bool = False) -> Events:
    """Lay out what the decoder reads and writes for a window.

    previous: (b) the symbol before it;  by_document: units are documents, not chunks
    Byte t sits at event t + (units ended before t); the end of its unit right after it.
    """
    text, real, length = window.bytes, window.is_real, window.length
    unit_start = window.doc_start if by_document else window.chunk_start
    unit_end = window.doc_end if by_document else window.chunk_end
    b, t = text.shape
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
    chunk = window.chunk_id.clamp(min=0)  # the twin's window may open inside a chunk
    last = text.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0] if t else previous
    return Events(
        target=lay(text, torch.where(window.doc_end, END_OF_DOCUMENT, END_OF_CHUNK)),
        symbol=lay(torch.where(unit_start, START, before), text),
        chunk=lay(chunk, chunk),
        length=total,
        doc_start=lay(window.doc_start & real, none),
        unit_start=lay(unit_start & real, none),
        bytes_before=lay(*(torch.arange(t, device=text.device).expand(b, t) + k for k in (0, 1))),
        last=torch.where(length > 0, last, previous),
    )
