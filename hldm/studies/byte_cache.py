"""A cache for the twin: what followed places like this one earlier in the document (Grave et al., arXiv 1612.04426).

    p'(x_t) = (1 - l) p(x_t) + l sum_j pi_j 1{x_j = x_t}

x_j are the bytes that followed the nearest of the twin's earlier states in the document; l and pi_j are functions of
distance and of how many bytes just before are the same. The gate is that of `hldm.generation.memory`, fitted on the
validation text: what a memory of latents is to be compared with.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.chunking.reading import held_out_windows
from hldm.generation.memory import ABSENT, Gate, Neighbours, Weighed, fit_numbers, query_of
from hldm.generation.remembering import Past, document_neighbours
from hldm.model.autoencoder import Autoencoder
from hldm.model.likelihood import read_chunks
from hldm.text.corpus import Corpus
from hldm.text.windows import Windows

MOST_BYTES = 32  # just before, that are compared


class Events(NamedTuple):
    """What the twin makes of a corpus: its bytes in a row, and the end of each document."""

    past: Past  # query: the twin's state before each; latents (e 1): the symbol; prints: the same, above 0
    log_p: Tensor  # (e) of each symbol under the twin
    byte: np.ndarray  # (e) where it stands in the corpus; an end at its document's last byte


@torch.no_grad()
def read_events(twin: Autoencoder, corpus: Corpus) -> Events:
    """Read a corpus, keeping the decoder's last layer before every symbol."""
    windows = held_out_windows(twin, corpus)
    device = next(twin.parameters()).device
    state, seen = twin.decoder_state(windows.lanes, device), []
    lanes: list[list[tuple[Tensor, ...]]] = [[] for _ in range(windows.lanes)]
    hook = twin.outputs.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        for step in range(windows.windows_per_epoch):
            reading, state = read_chunks(twin, windows.batch(step).to(device), None, state)
            query, mask = query_of(seen.pop()), reading.events.mask
            for row, lane in enumerate(lanes):
                parts = (query, -reading.symbol_nats, reading.events.target)
                lane.append(tuple(part[row, mask[row]].cpu() for part in parts))
    finally:
        hook.remove()
    # a lane is some documents of the corpus in order, and so are the lanes
    query, log_p, symbol = (
        torch.cat(parts) for parts in zip(*(part for lane in lanes for part in lane), strict=True)
    )
    document = np.repeat(np.arange(len(corpus)), np.diff(corpus.offsets) + 1)
    byte = np.arange(len(document)) - document
    byte[np.flatnonzero(np.diff(document, append=len(corpus)))] -= 1  # ends
    prints = symbol.numpy().astype(np.uint64) + np.uint64(1)
    return Events(Past(query, symbol[:, None].float(), prints, document), log_p, byte)


def cached(events: Events) -> Neighbours:
    """The earlier places of its document that are nearest to each event, and what followed them."""
    return document_neighbours(events.past, most=MOST_BYTES)


def log_density(weighed: Weighed, events: Events) -> Tensor:
    """log p' of each symbol (e)."""
    is_it = weighed.latents[..., 0] == events.past.latents
    recalled = weighed.log_weights.masked_fill(~is_it, ABSENT).logsumexp(dim=-1)
    return torch.logaddexp(weighed.log_kept + events.log_p, recalled)


def fit_cache(twin: Autoencoder, corpus: Corpus) -> Gate:
    """The gate under which a held-out corpus is likeliest."""
    events = read_events(twin, corpus)
    return fit_numbers({"document": cached(events)}, lambda weighed: log_density(weighed, events))


@torch.no_grad()
def nats_of_twin(twin: Autoencoder, gate: Gate, windows: Windows) -> dict[str, np.ndarray]:
    """Nats of every chunk of a latent model's windows, which cut no byte in two: without and with the cache. (n)"""
    events = read_events(twin, windows.corpus)
    chunk = np.cumsum(windows.chunk_start)[events.byte] - 1
    weighed = gate.weigh({"document": cached(events)})
    return {
        name: np.bincount(chunk, -log_p.double().numpy(), windows.chunks)
        for name, log_p in (("plain", events.log_p), ("cache", log_density(weighed, events)))
    }
