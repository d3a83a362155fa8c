"""The pyramid of mean-pooled latents: what a chunk may look at, near in full and far in summary.

Level l summarises r^l consecutive chunks of a document by the mean of their latents. With t chunks
written, the context is

    level 0: the chunks in [s_0, t),  level 1: the blocks of r in [s_1, s_0),  level 2: [s_2, s_1), ...
    s_l = floor_to_multiple(s_{l-1} - w r^l, r^{l+1}),   s_{-1} = t,   never below 0

so the levels tile the past without overlap, each shows between w and w + r - 1 entries, and w r^L
chunks of the past cost O(log n) entries. Every rule here is arithmetic on (level, end) of an entry,
hence the same in training, as one mask over a window, and in generation, as a short list of entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hldm.config import HierarchyConfig
from hldm.model.ops import take_rows


class Entries(NamedTuple):
    """Things a chunk may attend to, described by where they stand."""

    level: Tensor  # (b c) 0: a latent; l: the mean of r^l latents
    end: Tensor  # (b c) chunks of the document written when the entry was complete
    document: Tensor  # (b c) which document of the stream's window; -1: an empty slot


def level_starts(written: Tensor, config: HierarchyConfig) -> Tensor:
    """s_l for l = 0 .. levels, given the number of chunks written. (...) -> (... levels+1)."""
    starts, upper = [], written
    for level in range(config.levels + 1):
        unit = config.ratio**level
        # No level is coarser: this one drops single entries.
        align = unit * config.ratio if level < config.levels else unit
        upper = (upper - config.window * unit).clamp(min=0).div(align, rounding_mode="floor") * align
        starts.append(upper)
    return torch.stack(starts, dim=-1)


def visible(query_written: Tensor, query_document: Tensor, keys: Entries, config: HierarchyConfig) -> Tensor:
    """Which entries are the context when `query_written` chunks of a document are written.

    query_written, query_document: (b q); keys: (b c). Returns (b q c) bool.
    """
    starts = level_starts(query_written, config)  # (b q levels+1)
    uppers = torch.cat([query_written[..., None], starts[..., :-1]], dim=-1)
    level = keys.level[:, None, :].expand(-1, query_written.shape[1], -1)
    size = config.ratio**keys.level
    lower, upper = starts.gather(-1, level), uppers.gather(-1, level)
    begin, end = (keys.end - size)[:, None, :], keys.end[:, None, :]
    same = query_document[:, :, None] == keys.document[:, None, :]
    return same & (begin >= lower) & (end <= upper)


def still_needed(written: Tensor, document: Tensor, entries: Entries, config: HierarchyConfig) -> Tensor:
    """Which entries may be visible now or later, once `written` chunks are written. (b), (b) -> (b c)."""
    lower = level_starts(written, config).gather(-1, entries.level)
    begin = entries.end - config.ratio**entries.level
    return (entries.document == document[:, None]) & (begin >= lower)


def distance_in_blocks(query_written: Tensor, keys: Entries, config: HierarchyConfig) -> Tensor:
    """How far back an entry ends, in units of its own size: (b q c) int, small whatever the length."""
    away = (query_written[:, :, None] - keys.end[:, None, :]).clamp(min=0)
    return away.div((config.ratio**keys.level)[:, None, :], rounding_mode="floor")


class Walk(NamedTuple):
    """Where each chunk of a window stands in its document, and the one that will follow the window."""

    position: Tensor  # (b n+1) number of the chunk within its document, from 0: so many are written before it
    document: Tensor  # (b n+1) documents started in this window up to here; 0: the one carried in
    written: Tensor  # (b) position of the chunk that follows: chunks of the open document after the window
    open_document: Tensor  # (b) its document


def walk(doc_start: Tensor, mask: Tensor, written: Tensor) -> Walk:
    """Count chunks from their document's start. doc_start, mask: (b n); written: (b) carried in."""
    start = F.pad(doc_start & mask, (0, 1))  # (b n+1)
    index = torch.arange(start.shape[1], device=mask.device)
    last_start = torch.where(start, index, -1).cummax(dim=1).values
    position = torch.where(last_start >= 0, index - last_start, index + written[:, None])
    document = start.cumsum(dim=1)
    follows = mask.sum(dim=1, keepdim=True)
    return Walk(position, document, position.gather(1, follows)[:, 0], document.gather(1, follows)[:, 0])


def summaries(
    latents: Tensor, mask: Tensor, steps: Walk, partial: Tensor, config: HierarchyConfig
) -> tuple[Tensor, Entries, Tensor]:
    """Mean of each block of r^l latents that completes in this window, l = 1 .. levels.

    latents: (b n z); mask: (b n); partial: (b levels z) sums of the blocks left open before.
    Returns the means (b s z), where they stand, and the sums left open now (b levels z).
    """
    b, n, z = latents.shape
    total = torch.cat([latents.new_zeros(b, 1, z), (latents * mask[..., None]).cumsum(dim=1)], dim=1)
    count = mask.sum(dim=1)

    def since(first: Tensor, last: Tensor, level: int) -> Tensor:
        """Sum of latents first .. last-1; before the window lies the carried partial sum."""
        carried = (first < 0)[..., None] * partial[:, None, level - 1]
        return take_rows(total, last.clamp(min=0)) - take_rows(total, first.clamp(min=0)) + carried

    means, levels, ends, documents, left_open = [], [], [], [], []
    for level in range(1, config.levels + 1):
        size = config.ratio**level
        completes = mask & ((steps.position[:, :n] + 1) % size == 0)
        slots = n // size + 1  # at most one block completes every `size` chunks
        at = (~completes).to(torch.int8).argsort(dim=1, stable=True)[:, :slots]
        means.append(since(at + 1 - size, at + 1, level) / size)
        levels.append(torch.full_like(at, level))
        ends.append(steps.position.gather(1, at) + 1)
        documents.append(torch.where(completes.gather(1, at), steps.document.gather(1, at), -1))
        open_length = steps.written % size
        left_open.append(since((count - open_length)[:, None], count[:, None], level)[:, 0])
    if not means:
        empty = mask.new_zeros(b, 0, dtype=torch.long)
        return latents.new_zeros(b, 0, z), Entries(empty, empty, empty), partial
    entries = Entries(torch.cat(levels, 1), torch.cat(ends, 1), torch.cat(documents, 1))
    return torch.cat(means, dim=1), entries, torch.stack(left_open, dim=1)
