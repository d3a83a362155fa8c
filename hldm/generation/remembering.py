"""Remembering: a corpus read into a store, a document's own earlier chunks, and a writer that draws on both.

Everything that is retrieved before a chunk was there before the chunk: the training text, from which a document never
retrieves itself, and the chunks of its own document so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.chunking.reading import held_out_windows, read_windows
from hldm.config import HierarchyConfig
from hldm.generation.chunk import Piece
from hldm.generation.memory import (
    MOST_MATCHED,
    NEIGHBOURS,
    Gate,
    Neighbours,
    Weighed,
    count_matched,
    query_of,
)
from hldm.generation.memory_store import Entries, Store, fingerprint_of, principal_directions
from hldm.generation.pyramid import NONE, Growing, Index, pooled, search
from hldm.generation.writer import LatentWriter, Writer
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.runs.files import fingerprint
from hldm.text.corpus import Corpus, make_corpus
from hldm.text.windows import Windows

ROWS_AT_ONCE = 1024  # queries of one document that are compared with its chunks
SAMPLE = 16_384  # queries whose principal directions a store keeps
READ_LANES = 64  # of a store's text: twice as fast as the 16 of short texts


# ---- a corpus


class Past(NamedTuple):
    """What is retrieved by and from the chunks of a corpus, in its order."""

    query: Tensor  # (n w)
    latents: Tensor  # (n z) mu
    prints: np.ndarray  # (n) uint64 fingerprint of each chunk's bytes
    document: np.ndarray  # (n) int64

    @property
    def first(self) -> np.ndarray:
        """The first chunk of each chunk's document. (n)"""
        return np.searchsorted(self.document, self.document)

    def print_before(self, chunk: np.ndarray, back: int) -> np.ndarray:
        """The fingerprint of the chunk so many places before each; 0 where the document begins."""
        return np.where(chunk - back >= self.first[chunk], self.prints[(chunk - back).clip(min=0)], 0)

    def history(self, most: int = MOST_MATCHED) -> np.ndarray:
        """Of each chunk, see `count_matched`. (n most)"""
        chunk = np.arange(len(self.prints))
        return np.stack([self.print_before(chunk, back) for back in range(1, most + 1)], axis=1)


def chunk_prints(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprints of a corpus's chunks, and the document of each. (n) twice."""
    text, starts = windows.corpus.text.tobytes(), np.flatnonzero(windows.chunk_start)
    ends = np.append(starts[1:], len(text)).tolist()
    prints = [fingerprint_of(text[a:b]) for a, b in zip(starts.tolist(), ends, strict=True)]
    document = np.searchsorted(windows.corpus.offsets, starts, side="right") - 1
    return np.array(prints, np.uint64), document


@torch.no_grad()
def read_past(autoencoder: Autoencoder, windows: Windows) -> Past:
    """Read a corpus that fits into memory."""
    query = torch.zeros(windows.chunks, autoencoder.settings.known_width)
    latents = torch.zeros(windows.chunks, autoencoder.latent_dim)
    for batch, encoding in read_windows(autoencoder, windows):
        chunk = batch.chunk_index[batch.is_chunk].cpu()
        query[chunk] = query_of(encoding.before[batch.is_chunk]).cpu()
        latents[chunk] = encoding.latents[batch.is_chunk].float().cpu()
    return Past(query, latents, *chunk_prints(windows))


@torch.no_grad()
def entries_of(autoencoder: Autoencoder, corpus: Corpus) -> Entries:
    """What a store of a text holds. Raises ValueError where the model makes vectors of it that are not finite."""
    windows = held_out_windows(autoencoder, corpus, lanes=READ_LANES)
    latents = np.zeros((windows.chunks, autoencoder.latent_dim), np.float32)
    keys = projection = None
    waiting: list[tuple[np.ndarray, Tensor]] = []
    for step, (batch, encoding) in enumerate(read_windows(autoencoder, windows)):
        chunk = batch.chunk_index[batch.is_chunk].cpu().numpy()
        latents[chunk] = encoding.latents[batch.is_chunk].float().cpu().numpy()
        waiting.append((chunk, query_of(encoding.before[batch.is_chunk]).cpu()))
        is_last = step == windows.windows_per_epoch - 1
        if projection is None and not is_last and sum(len(each) for each, _ in waiting) < SAMPLE:
            continue
        if projection is None or keys is None:
            projection = principal_directions(query for _, query in waiting)
            keys = np.zeros((windows.chunks, len(projection) - 1), np.float16)
        for at, query in waiting:
            keys[at] = (query.numpy() - projection[0]) @ projection[1:].T
        waiting = []
    assert keys is not None and projection is not None
    if not (np.isfinite(keys).all() and np.isfinite(latents).all()):
        raise ValueError("the model makes vectors of this text that are not finite: train it again")
    prints, document = chunk_prints(windows)
    documents = np.append(np.searchsorted(document, np.arange(len(corpus))), windows.chunks)
    starts = np.append(np.flatnonzero(windows.chunk_start), len(corpus.text)).astype(np.int64)
    return Entries(
        keys, latents, prints, corpus.text, starts, documents.astype(np.int64), digests_of(corpus), projection
    )


def digests_of(corpus: Corpus) -> np.ndarray:
    """A fingerprint of every document. (documents) uint64"""
    return np.array([fingerprint_of(document.tobytes()) for document in corpus], np.uint64)


def own_entries(store: Store, corpus: Corpus, document: np.ndarray) -> np.ndarray:
    """The entries of a store that each chunk of a corpus may not retrieve: those of its own document. (n 2)"""
    spans = [store.own_entries(int(digest)) for digest in digests_of(corpus)]
    return np.array(spans, np.int64).reshape(-1, 2)[document]


def stored_neighbours(store: Store, corpus: Corpus, past: Past) -> Neighbours:
    """Of every chunk of a corpus in a store, a few at a time."""
    own, history = own_entries(store, corpus, past.document), past.history()
    parts = [
        store.neighbours(past.query[part], history[part], own[part])
        for first in range(0, len(past.prints), ROWS_AT_ONCE)
        for part in [slice(first, first + ROWS_AT_ONCE)]
    ]
    return Neighbours(*map(torch.cat, zip(*parts, strict=True)))


def document_neighbours(
    past: Past, count: int = NEIGHBOURS, index: Index | None = None, most: int = MOST_MATCHED
) -> Neighbours:
    """Of every chunk among those before it in its own document, or those of them that an index finds.

    most: chunks just before that are compared
    """
    n = len(past.prints)
    distance, entry = torch.full((n, count), torch.inf), torch.zeros(n, count, dtype=torch.long)
    for rows, first in _stretches(past.document):
        keys, query = past.query[first : rows.stop], past.query[rows]
        written = torch.arange(rows.start - first, rows.stop - first)
        if index is None:
            chunk = torch.arange(len(keys)).expand(len(query), -1)
            square = torch.cdist(query, keys).square().masked_fill(chunk >= written[:, None], torch.inf)
        else:
            chunk = search(pooled(keys, index), query, written, index).chunk
            square = (keys[chunk.clamp(min=0)] - query[:, None]).square().sum(dim=-1)
            square = square.masked_fill(chunk == NONE, torch.inf)
        near, at = square.topk(min(count, chunk.shape[1]), largest=False)
        distance[rows, : near.shape[1]] = near
        entry[rows, : near.shape[1]] = chunk.gather(1, at).clamp(min=0) + first
    matched = count_matched(past.history(most), entry.numpy(), past.print_before)
    return Neighbours.of(past.latents[entry], distance, matched)


def compared_with(past: Past, index: Index | None) -> float:
    """With how many keys and means a chunk is compared, on average."""
    total = 0
    for rows, first in _stretches(past.document):
        written = torch.arange(rows.start - first, rows.stop - first)
        if index is not None:
            levels = pooled(past.query[first : rows.stop], index)
            written = search(levels, past.query[rows], written, index).compared
        total += int(written.sum())
    return total / len(past.prints)


def _stretches(document: np.ndarray) -> Iterator[tuple[slice, int]]:
    """Chunks of one document, a few in a row, and the first of their document."""
    borders = [0, *(np.flatnonzero(np.diff(document)) + 1).tolist(), len(document)]
    for begin, end in zip(borders[:-1], borders[1:], strict=True):
        for first in range(begin, end, ROWS_AT_ONCE):
            yield slice(first, min(first + ROWS_AT_ONCE, end)), begin


# ---- writing


class EarlierChunks:
    """The chunks of one document so far: query before each, latent, fingerprint. All are compared, or an index's."""

    def __init__(self, width: int, latent_dim: int, index: Index | None = None):
        self._room = 64
        self._pyramid = None if index is None else Growing(width, index)
        self.query, self.latents = torch.zeros(self._room, width), torch.zeros(self._room, latent_dim)
        self.prints: list[int] = []

    def add(self, query: Tensor, latent: Tensor, print_: int) -> None:
        """Take in the next chunk. query (w), latent (z)."""
        at = len(self.prints)
        if at == self._room:
            self.query, self.latents = (
                torch.cat([x, torch.zeros_like(x)]) for x in (self.query, self.latents)
            )
            self._room *= 2
        self.query[at], self.latents[at] = query, latent
        self.prints.append(print_)
        if self._pyramid is not None:
            self._pyramid.add(query)

    def history(self) -> np.ndarray:
        """See `count_matched`. (1 MOST_MATCHED)"""
        last = self.prints[: -MOST_MATCHED - 1 : -1]
        return np.array([last + [0] * (MOST_MATCHED - len(last))], np.uint64)

    def neighbours(self, query: Tensor, count: int = NEIGHBOURS) -> Neighbours:
        """The nearest of them to one query (1 w)."""
        size = len(self.prints)
        distance, entry = torch.full((1, count), torch.inf), torch.zeros(1, count, dtype=torch.long)
        if size:
            chunk = torch.arange(size)
            if self._pyramid is not None:
                found = self._pyramid.search(query).chunk[0]
                chunk = found[found != NONE]
            square = torch.cdist(query, self.query[chunk]).square()
            near, at = square.topk(min(count, len(chunk)), largest=False)
            distance[:, : near.shape[1]], entry[:, : near.shape[1]] = near, chunk[at]
        prints = np.array(self.prints or [0], np.uint64)

        def before(chunk: np.ndarray, back: int) -> np.ndarray:
            return np.where(chunk >= back, prints[(chunk - back).clip(min=0)], 0)

        return Neighbours.of(
            self.latents[entry], distance, count_matched(self.history(), entry.numpy(), before)
        )


class Memory(NamedTuple):
    """What a writer remembers: a store of text, its document, or both."""

    store: Store | None
    gate: Gate
    seek: Index | None = None  # by which a document's own chunks are sought; None: all are compared

    def through(self, writer: Writer, prompts: Sequence[bytes]) -> RememberingWriter:
        """This writer, its latents drawn from the extended mixture."""
        return RememberingWriter(writer, prompts, self)


def check_remembers(prior: Prior | None) -> Prior:
    """The prior, if a memory can extend it. Raises ValueError, one line."""
    if prior is None:
        raise ValueError("a memory remembers latents, and the twin has none: take the run with latents")
    if prior.mixture is None:
        raise ValueError("a memory extends a mixture, and this prior has none (autoencoder.components=0)")
    return prior


def open_memory(name: str, autoencoder: Autoencoder, hierarchy: HierarchyConfig) -> Memory:
    """A store by its folder, with the document's own memory beside it; or that alone: `document`.

    `pyramid` is the document's own as well, sought through the means of its blocks: in a long one, faster.

    Raises FileNotFoundError or ValueError, one line.
    """
    if name == "document":
        return Memory(None, Gate.of_document())
    if name == "pyramid":
        return Memory(None, Gate.of_document(), Index.of(hierarchy))
    store = Store(Path(name), fingerprint(autoencoder.state_dict()))
    if "both" not in store.gates:
        raise ValueError(f"{name} has no gate yet: its build was not finished, build it again")
    return Memory(store, store.gates["both"])


class RememberingWriter:
    """A writer whose next latents are drawn from the mixture that its memory extends.

    The model's own part is drawn as ever, by denoising or from its mixture; with probability l a neighbour takes its
    place.
    """

    def __init__(self, writer: Writer, prompts: Sequence[bytes], memory: Memory):
        """Reads the prompts into the memory of each document. Raises ValueError, one line, see `check_remembers`."""
        if not isinstance(writer, LatentWriter):
            check_remembers(None)
        assert isinstance(writer, LatentWriter)
        check_remembers(writer.prior)
        self.writer, self.memory = writer, memory
        self.calls = 0
        self.written = self.recalled = 0  # chunks
        width, z = writer.autoencoder.settings.known_width, writer.prior.latent_dim
        self.documents = [EarlierChunks(width, z, memory.seek) for _ in prompts]
        if any(prompts):
            corpus = make_corpus("prompts", prompts)
            windows = held_out_windows(writer.autoencoder, corpus, closes=np.zeros(len(corpus), bool))
            past = read_past(writer.autoencoder, windows)
            row_of = [row for row, prompt in enumerate(prompts) if prompt]
            for chunk, document in enumerate(past.document.tolist()):
                earlier = self.documents[row_of[document]]
                earlier.add(past.query[chunk], past.latents[chunk], int(past.prints[chunk]))

    def query(self) -> Tensor:
        """What is looked up before the next chunk of every row. (b w)"""
        opens = torch.tensor(self.writer.opens, device=self.writer.device)
        return query_of(self.writer.encoder.known * ~opens[:, None]).cpu()

    def weigh(self, query: Tensor) -> Weighed:
        """The extended mixture before the next chunk of every row."""
        found = {}
        if "document" in self.memory.gate.sources:
            each = [own.neighbours(part) for own, part in zip(self.documents, query.split(1), strict=True)]
            found["document"] = Neighbours(*map(torch.cat, zip(*each, strict=True)))
        if self.memory.store is not None:
            history = np.concatenate([own.history() for own in self.documents])
            found["training"] = self.memory.store.neighbours(query, history)
        return self.memory.gate.weigh(found)

    def write(self) -> list[Piece]:
        """Draw and write one chunk a row."""
        writer, query = self.writer, self.query()
        drawn = writer.sample_latents()
        z_0, is_recalled = self.weigh(query).draw(
            drawn.cpu(), writer.generators, writer.prior.diffusion.gamma_0, writer.settings.temperature
        )
        written, self.calls = writer.draw(z_0.to(drawn)), writer.calls
        writer.take_in(written)
        pieces, latents = written.pieces, written.latents[:, 0].float().cpu()
        self.written, self.recalled = self.written + len(pieces), self.recalled + int(is_recalled.sum())
        for row, (piece, latent) in enumerate(zip(pieces, latents, strict=True)):
            self.documents[row].add(query[row], latent, fingerprint_of(piece.text))
            if piece.ends_document:
                self.documents[row] = EarlierChunks(query.shape[1], len(latent), self.memory.seek)
        return pieces
