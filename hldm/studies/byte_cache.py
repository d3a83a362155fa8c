"""A cache of bytes: what followed places like this one earlier in the document (Grave et al., arXiv 1612.04426).

    p'(x_t) = (1 - l) p(x_t) + l sum_j pi_j 1{x_j = x_t}

x_j are the bytes that followed the nearest of the decoder's earlier states in the document; l and pi_j are functions of
distance and of how many bytes just before are the same. The gate is that of `hldm.generation.memory`, fitted on the
validation text. For the twin it is what a memory of latents is to be compared with; for the decoder of a latent model,
which knows z_0 as well, what that memory leaves to be remembered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.chunking.reading import held_out_windows, read_windows
from hldm.generation.memory import ABSENT, Gate, Neighbours, Weighed, fit_numbers, query_of
from hldm.generation.remembering import Past, document_neighbours
from hldm.model.autoencoder import Autoencoder
from hldm.model.likelihood import Reading, noisy_latents, read_chunks
from hldm.runs.clock import clock_named
from hldm.text.corpus import Corpus
from hldm.text.windows import Batch, Windows

MOST_BYTES = 32  # just before, that are compared


class Events(NamedTuple):
    """What a decoder makes of a corpus: its bytes and ends in a row."""

    past: Past  # query: the decoder's state before each; latents (e 1): the symbol; prints: the same, above 0
    log_p: Tensor  # (e) of each symbol under the decoder
    byte: (
        np.ndarray
    )  # (e) of the corpus where it stands, an end its document's last; with latents its chunk's first


@torch.no_grad()
def read_events(decoder: Autoencoder, corpus: Corpus, gamma_0: float | None = None, seed: int = 0) -> Events:
    """Read a corpus, keeping the decoder's last layer before every symbol.

    gamma_0: the noise of the latents that it is given, drawn once by the seed; None: it is a twin
    """
    windows = held_out_windows(decoder, corpus)
    seen: list[Tensor] = []
    lanes: list[list[tuple[Tensor, ...]]] = [[] for _ in range(windows.lanes)]
    hook = decoder.outputs.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        for batch, reading in _readings(decoder, windows, gamma_0, seed):
            query, events = query_of(seen[-1]), reading.events
            chunk = torch.zeros_like(events.target)
            if gamma_0 is not None:
                chunk = batch.chunk_index.gather(1, events.chunk)
            seen.clear()
            for row, lane in enumerate(lanes):
                parts = (query, -reading.symbol_nats, events.target, chunk)
                lane.append(tuple(part[row, events.mask[row]].cpu() for part in parts))
    finally:
        hook.remove()
    # a stream is some documents of the corpus in order, and so are the streams
    query, log_p, symbol, chunk = (
        torch.cat(parts) for parts in zip(*(part for lane in lanes for part in lane), strict=True)
    )
    if gamma_0 is None:
        document = np.repeat(np.arange(len(corpus)), np.diff(corpus.offsets) + 1)
        byte = np.arange(len(document)) - document
        byte[np.flatnonzero(np.diff(document, append=len(corpus)))] -= 1  # ends
    else:
        byte = np.flatnonzero(windows.chunk_start)[chunk.numpy()]
        document = np.searchsorted(corpus.offsets, byte, side="right") - 1
    prints = symbol.numpy().astype(np.uint64) + np.uint64(1)
    return Events(Past(query, symbol[:, None].float(), prints, document), log_p, byte)


def _readings(
    decoder: Autoencoder, windows: Windows, gamma_0: float | None, seed: int
) -> Iterator[tuple[Batch, Reading]]:
    device = next(decoder.parameters()).device
    state = decoder.decoder_state(windows.lanes, device)
    if gamma_0 is None:
        for step in range(windows.windows_per_epoch):
            batch = windows.batch(step).to(device)
            reading, state = read_chunks(decoder, batch, None, state)
            yield batch, reading
        return
    generator = torch.Generator().manual_seed(seed)
    for batch, encoding in read_windows(decoder, windows):
        z_0 = noisy_latents(encoding, gamma_0, batch, generator)
        reading, state = read_chunks(decoder, batch, z_0, state, encoding)
        yield batch, reading


def cached(events: Events) -> Neighbours:
    """The earlier places of its document that are nearest to each event, and what followed them."""
    return document_neighbours(events.past, most=MOST_BYTES)


def log_density(weighed: Weighed, events: Events) -> Tensor:
    """log p' of each symbol (e)."""
    is_it = weighed.latents[..., 0] == events.past.latents
    recalled = weighed.log_weights.masked_fill(~is_it, ABSENT).logsumexp(dim=-1)
    return torch.logaddexp(weighed.log_kept + events.log_p, recalled)


def fit_cache(decoder: Autoencoder, corpus: Corpus, gamma_0: float | None = None, seed: int = 0) -> Gate:
    """The gate under which a held-out corpus is likeliest. gamma_0, seed: see `read_events`."""
    events = read_events(decoder, corpus, gamma_0, seed)
    return fit_numbers({"document": cached(events)}, lambda weighed: log_density(weighed, events))


class Cached(NamedTuple):
    """What a decoder takes to read a corpus, "plain" and with its "cache"."""

    nats: dict[str, np.ndarray]  # (n) of every chunk
    speed: dict[str, float]  # bytes a CPU second


@torch.no_grad()
def read_cached(
    decoder: Autoencoder, gate: Gate, windows: Windows, gamma_0: float | None = None, seed: int = 0
) -> Cached:
    """Read a latent model's windows without and with the cache.

    gamma_0, seed: see `read_events`;  decoder: that model's own, or a twin's
    """
    clock = clock_named("cpu")
    began = clock()
    events = read_events(decoder, windows.corpus, gamma_0, seed)
    read = clock()
    found = log_density(gate.weigh({"document": cached(events)}), events)
    size, spent = len(windows.corpus.text), {"plain": read - began, "cache": clock() - began}
    chunk = np.cumsum(windows.chunk_start)[events.byte] - 1
    return Cached(
        {
            name: np.bincount(chunk, -log_p.double().numpy(), windows.chunks)
            for name, log_p in (("plain", events.log_p), ("cache", found))
        },
        {name: size / seconds for name, seconds in spent.items()},
    )
