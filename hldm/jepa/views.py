"""What the context encoder reads instead of the text: holes in it, or other letters, every chunk in its place.

Targets are always of the clean text, so a view also says which chunks are to be predicted, and which are hidden whole.
Draws are made for the global batch (`draw_uniform`), so that a view is the same for any split of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from hldm.jepa.config import PlacedView, ViewsConfig
from hldm.jepa.encoder import NULL
from hldm.text.windows import Batch, Window, draw_uniform

LONGEST_SPAN = 10  # chunks
LEAST_VISIBLE = 0.3  # of the chunks of a row: what is hidden is to be predicted from something
PLACED = frozenset(get_args(PlacedView))
SPANS_OF_A_ROW = 64  # tried, at most


class View(NamedTuple):
    """A window as the context encoder reads it; as many chunks a row as the clean one."""

    window: Window
    wanted: Tensor  # (b n) bool: chunks to predict
    hidden: Tensor  # (b n) bool: chunks of which nothing can be read


def make_view(batch: Batch, views: ViewsConfig, generator: torch.Generator, letters: Tensor) -> View:
    """The view that the settings name. letters: (256) how often each byte stands in the training text."""
    none = torch.zeros_like(batch.is_chunk)
    if views.kind not in PLACED or views.kind == "none":  # the text itself is the view
        return View(batch, batch.is_chunk, none)
    if views.kind in ("null-spans", "null-chunks"):
        choose = hidden_spans if views.kind == "null-spans" else _hidden_chunks
        hidden = choose(batch, views, generator)
        return View(with_holes(batch, hidden, views.hole_bytes), hidden, hidden)
    text = {"null-bytes": _null_bytes, "random-chars": _random_letters, "case": _other_case}[views.kind](
        batch, views.share, generator, letters
    )
    differs = (text != batch.bytes) & batch.is_real
    row, at = differs.nonzero(as_tuple=True)
    wanted = none.clone()
    wanted[row, batch.chunk_id[row, at]] = True
    return View(_as_window(batch, bytes=text), wanted, none)


def hidden_spans(batch: Batch, views: ViewsConfig, generator: torch.Generator) -> Tensor:
    """Which chunks are hidden (b n): spans from a uniform start, of geometric length, until their share is reached.

    A share `LEAST_VISIBLE` of a row's chunks stays; a row of one chunk hides nothing.
    """
    start, length = draw_uniform(batch, (2, SPANS_OF_A_ROW), generator).unbind(1)  # (b spans) each
    count = batch.count
    first = (start * count[:, None]).long()
    # geometric with this mean: P(length > k) = (1 - 1/mean)^k
    ratio = math.log1p(-1 / views.span) if views.span > 1 else -math.inf
    size = 1 + ((1 - length).log() / ratio).long().clamp(0, LONGEST_SPAN - 1)
    enough = (views.share * count).ceil().long()
    most = (count - (LEAST_VISIBLE * count).ceil().long()).clamp(min=0)
    place = torch.arange(batch.chunks, device=count.device)
    hidden = torch.zeros_like(batch.is_chunk)
    for span in range(SPANS_OF_A_ROW):
        begin, end = first[:, span, None], (first + size)[:, span, None]
        wider = hidden | ((place >= begin) & (place < end) & batch.is_chunk)
        takes = (hidden.sum(dim=1) < enough) & (wider.sum(dim=1) <= most)
        hidden = torch.where(takes[:, None], wider, hidden)
    return hidden


def _hidden_chunks(batch: Batch, views: ViewsConfig, generator: torch.Generator) -> Tensor:
    """Each chunk by itself (b n), as many of a row as spans would hide."""
    draw = draw_uniform(batch, (batch.chunks,), generator).masked_fill(~batch.is_chunk, math.inf)
    most = (batch.count - (LEAST_VISIBLE * batch.count).ceil().long()).clamp(min=0)
    wanted = torch.minimum((views.share * batch.count).ceil().long(), most)
    return draw.argsort(dim=1).argsort(dim=1) < wanted[:, None]


def with_holes(window: Window, hidden: Tensor, hole_bytes: int) -> Window:
    """The window with NULL for every byte of the hidden chunks (b n): so many a chunk, or as many as it had (0).

    Holes of the chunks' own lengths tell how long the hidden words are, and that alone explains a quarter of what is
    to be predicted (docs/jepa.md).
    """
    chosen = hidden.gather(1, window.chunk_id.clamp(min=0)) & window.is_real
    if not hole_bytes:
        return _as_window(window, bytes=window.bytes.masked_fill(chosen, NULL))
    size = (window.last_byte - window.first_byte + 1) * window.is_chunk  # (b n)
    size = torch.where(hidden, hole_bytes, size)
    end = size.cumsum(dim=1)
    length = end[:, -1]
    at = torch.arange(int(length.max()), device=size.device).expand(len(size), -1).contiguous()
    chunk = torch.searchsorted(end, at, right=True).clamp(max=window.chunks - 1)  # (b t')
    place = at - (end - size).gather(1, chunk)
    is_real = at < length[:, None]
    is_hole = hidden.gather(1, chunk)
    source = (window.first_byte.gather(1, chunk) + place).clamp(max=window.bytes.shape[1] - 1)
    text = window.bytes.gather(1, source).masked_fill(is_hole, NULL) * is_real
    chunk_start = (place == 0) & is_real
    ends = window.doc_end.gather(1, window.last_byte).gather(1, chunk)
    return Window(
        bytes=text,
        length=length,
        doc_start=chunk_start & window.opens_document.gather(1, chunk),
        doc_end=(place == size.gather(1, chunk) - 1) & ends & is_real,
        chunk_start=chunk_start,
        chunks=window.chunks,
    )


def reset_before(window: Window, hidden: Tensor) -> Window:
    """The window with a document's start at every first chunk of a hidden span, so that no state reaches into it."""
    before = torch.nn.functional.pad(hidden, (1, 0))[:, :-1]
    first = (hidden & ~before).gather(1, window.chunk_id.clamp(min=0)) & window.is_real
    return _as_window(window, doc_start=window.doc_start | (first & window.chunk_start))


def _as_window(window: Window, **changes: Tensor) -> Window:
    """The plain window of a batch, with some fields replaced."""
    plain = Window(
        bytes=window.bytes,
        length=window.length,
        doc_start=window.doc_start,
        doc_end=window.doc_end,
        chunk_start=window.chunk_start,
        chunks=window.chunks,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- other bytes in the same places


def _null_bytes(batch: Batch, share: float, generator: torch.Generator, letters: Tensor) -> Tensor:
    """Each byte hidden by itself."""
    draw = draw_uniform(batch, batch.bytes.shape[1:], generator)
    return batch.bytes.masked_fill(draw < share, NULL)


def _random_letters(batch: Batch, share: float, generator: torch.Generator, letters: Tensor) -> Tensor:
    """Each letter of the Latin alphabet replaced by one drawn by its frequency."""
    draw, which = draw_uniform(batch, (2, batch.bytes.shape[1]), generator).unbind(1)
    index = torch.arange(256, device=letters.device)
    weight = letters.double() * _is_letter(index)
    other = torch.searchsorted((weight.cumsum(0) / weight.sum()).float(), which.contiguous(), right=True)
    return torch.where((draw < share) & _is_letter(batch.bytes), other.clamp(max=255), batch.bytes)


def _other_case(batch: Batch, share: float, generator: torch.Generator, letters: Tensor) -> Tensor:
    """Every other word, by chance, in lower case, in upper case, or with a capital."""
    draw, which = draw_uniform(batch, (2, batch.bytes.shape[1]), generator).unbind(1)
    letter = _is_letter(batch.bytes)
    first = letter & ~torch.nn.functional.pad(letter, (1, 0))[:, :-1]
    index = torch.arange(letter.shape[1], device=letter.device).expand_as(letter)
    word = torch.where(first, index, 0).cummax(dim=1).values  # where the word of each byte begins
    takes, form = draw.gather(1, word) < 0.5, (3 * which.gather(1, word)).long()
    lower, upper = batch.bytes | 0x20, batch.bytes & ~0x20
    cased = torch.where((form == 1) | ((form == 2) & first), upper, lower)
    return torch.where(letter & takes, cased, batch.bytes)


def _is_letter(symbols: Tensor) -> Tensor:
    """A to Z and a to z."""
    lower = symbols | 0x20
    return (lower >= 97) & (lower <= 122) & (symbols < 128)
