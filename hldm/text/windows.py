"""Windows of text: what a model reads at a time, and a corpus laid out in them for training.

A `Window` is a stretch of several texts, a row each, whole chunks, padded on the right, with what follows from where
documents and chunks start. A stream (`lanes` of them) is one long text, documents end to end; a `Batch` is the
same window of every stream, so recurrent state carries from one batch to the next. Every batch is a pure function of
(seed, step): nothing to save, nothing to replay on resume, and the same batch on any number of machines. Bytes only;
knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from hldm.text.bytes import count_characters, to_ids
from hldm.text.corpus import Corpus
from hldm.text.noise import PlacedGenerator

W = TypeVar("W", bound="Window")


@dataclass(frozen=True, eq=False, kw_only=True)
class Window:
    """A stretch of several texts, a row each: whole chunks, padded on the right.

    What follows from its fields is computed when it is first asked for, and kept.
    Raises ValueError when shapes do not agree.
    """

    bytes: Tensor  # (b t) int64, 0 where padded
    length: Tensor  # (b) int64 bytes of each row; 0 where a text has run out
    doc_start: Tensor  # (b t) bool: the first byte of a document or of a stream, resets the state
    doc_end: Tensor  # (b t) bool: the last byte of a document
    chunk_start: Tensor  # (b t) bool: the first byte of a chunk
    chunks: int  # n, room for so many a row: the most in any row, or more

    def __post_init__(self) -> None:
        shape = self.bytes.shape
        flags = (self.doc_start.shape, self.doc_end.shape, self.chunk_start.shape)
        if len(shape) != 2 or self.length.shape != shape[:1] or any(flag != shape for flag in flags):
            raise ValueError(
                f"doc_start, doc_end and chunk_start are (b t) like the bytes and length is (b), got bytes "
                f"{tuple(shape)}, length {tuple(self.length.shape)} and flags {[tuple(flag) for flag in flags]}"
            )

    def to(self: W, device: torch.device | str) -> W:
        """The same on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @cached_property
    def is_real(self) -> Tensor:
        """(b t) bool: bytes of the text, not padding."""
        return torch.arange(self.bytes.shape[1], device=self.bytes.device) < self.length[:, None]

    @cached_property
    def chunk_id(self) -> Tensor:
        """(b t) which chunk of its row every byte belongs to, from 0; -1 where padded."""
        number = (self.chunk_start & self.is_real).cumsum(dim=1) - 1
        return number.masked_fill(~self.is_real, -1)

    @cached_property
    def place(self) -> Tensor:
        """(b t) how far into its chunk every byte is, from 0."""
        return since_start(self.chunk_start)

    @cached_property
    def chunk_end(self) -> Tensor:
        """(b t) bool: the last byte of a chunk, before the next one starts or the row ends."""
        none = self.chunk_start.new_zeros(self.chunk_start.shape[0], 1)
        at = torch.arange(self.bytes.shape[1], device=self.bytes.device)
        return torch.cat([self.chunk_start[:, 1:], none], dim=1) | (at == self.length[:, None] - 1)

    @cached_property
    def count(self) -> Tensor:
        """(b) chunks of each row."""
        return (self.chunk_start & self.is_real).sum(dim=1)

    @cached_property
    def is_chunk(self) -> Tensor:
        """(b n) bool: chunks of the text, not padding."""
        return torch.arange(self.chunks, device=self.bytes.device) < self.count[:, None]

    @cached_property
    def first_byte(self) -> Tensor:
        """(b n) where each chunk starts; anywhere where there is none."""
        return _positions(self.chunk_start, self.chunks)

    @cached_property
    def last_byte(self) -> Tensor:
        """(b n) where each chunk ends; anywhere where there is none."""
        return _positions(self.chunk_end, self.chunks)

    @cached_property
    def opens_document(self) -> Tensor:
        """(b n) bool: the first chunk of a document."""
        return self.doc_start.gather(1, self.first_byte) & self.is_chunk

    @cached_property
    def characters(self) -> Tensor:
        """() UTF-8 characters: the bytes that do not continue one."""
        return ((self.bytes & 0xC0 != 0x80) & self.is_real).sum()


def since_start(start: Tensor) -> Tensor:
    """How many positions after the last start each one is. (b t) bool -> (b t)."""
    index = torch.arange(start.shape[1], device=start.device).expand_as(start)
    return index - torch.where(start, index, 0).cummax(dim=1).values


def _positions(flags: Tensor, count: int) -> Tensor:
    """Where the first `count` flags of each row are set; anywhere beyond them. (b t) bool -> (b count)."""
    return (~flags).to(torch.int8).argsort(dim=1, stable=True)[:, :count]


def window_of(
    texts: Sequence[bytes],
    starts: Sequence[np.ndarray],
    opens: Sequence[bool],
    device: torch.device | str = "cpu",
    *,
    width: int | None = None,
    chunks: int | None = None,
) -> Window:
    """A window of texts, a row each, that end no document.

    starts: where the chunks of each start, (t) bool;  opens: whether it starts a document
    width, chunks: room for so many bytes and chunks a row; the most in any row when None
    """
    width = max(map(len, texts), default=0) if width is None else width
    ids = np.zeros((len(texts), width), dtype=np.int64)
    chunk_start = np.zeros(ids.shape, dtype=bool)
    doc_start = np.zeros(ids.shape, dtype=bool)
    for row, (text, start, opening) in enumerate(zip(texts, starts, opens, strict=True)):
        ids[row, : len(text)] = to_ids(text)
        chunk_start[row, : len(text)] = start
        doc_start[row, :1] = opening and len(text) > 0
    if chunks is None:
        chunks = int(chunk_start.sum(axis=1).max(initial=0))
    return Window(
        bytes=torch.from_numpy(ids),
        length=torch.tensor([len(text) for text in texts], dtype=torch.long),
        doc_start=torch.from_numpy(doc_start),
        doc_end=torch.zeros(ids.shape, dtype=torch.bool),
        chunk_start=torch.from_numpy(chunk_start),
        chunks=chunks,
    ).to(device)


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch(Window):
    """One window of every stream of a corpus, or some rows of it."""

    chunk_index: Tensor  # (b n) int64 number of each chunk in the corpus, -1 where padded
    first_row: int  # which rows of the global batch these are ...
    total_rows: int  # ... out of how many
    total_bytes: int  # in all rows of the window, not only these
    weight: Tensor | None = None  # (b n) what a nat of each chunk counts in the loss; None: all the same


def draw_normal(batch: Batch, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise (b *shape): drawn for the global batch, then this part's rows; or by place."""
    if isinstance(generator, PlacedGenerator):
        return generator.draw(torch.randn, batch, shape)
    return _own_rows(batch, torch.randn(batch.total_rows, *shape, generator=generator))


def draw_uniform(batch: Batch, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform noise in [0, 1), by the same rule."""
    if isinstance(generator, PlacedGenerator):
        return generator.draw(torch.rand, batch, shape)
    return _own_rows(batch, torch.rand(batch.total_rows, *shape, generator=generator))


def _own_rows(batch: Batch, drawn: Tensor) -> Tensor:
    rows = slice(batch.first_row, batch.first_row + batch.bytes.shape[0])
    return drawn[rows].to(batch.bytes.device)


class CutsText(Protocol):
    """What `Windows` asks of a chunker (hldm.chunking.chunker)."""

    max_bytes: int

    def chunk_starts(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """(t) bool: where chunks of documents in a row start."""
        ...


class _Stream(NamedTuple):
    """The documents of an epoch in a row."""

    order: np.ndarray  # (documents,) which document comes when
    start: np.ndarray  # (documents + 1,) where each begins in the stream


class ByStep:
    """Batches of a corpus that are functions of their step: a checkpoint need not keep where they are."""

    corpus: Corpus

    @property
    def identity(self) -> dict[str, str]:
        """What a training that goes on must find unchanged."""
        return {"corpus": self.corpus.fingerprint}

    def cursor(self) -> dict[str, Tensor]:
        """What a checkpoint must keep of where it is, by name."""
        return {}

    def seek(self, step: int, saved: dict[str, Tensor]) -> None:
        """Go on after so many steps."""

    def close(self) -> None:
        """Nothing is open."""


class Windows(ByStep):
    """Batches of a corpus, each a pure function of (seed, step).

    shuffle=True (training): every epoch permutes the documents, joins them, and cuts the result into
    lanes x windows_per_epoch pieces of equal length, at most window_bytes. shuffle=False (evaluation):
    corpus order, streams cut between documents only, windows of window_bytes. Either way a chunk belongs to
    the piece that holds its first byte, so every byte of an epoch appears once, and a row is at most
    window_bytes + max_bytes - 1 long.
    """

    def __init__(
        self,
        corpus: Corpus,
        chunker: CutsText,
        *,
        lanes: int,
        window_bytes: int,
        seed: int = 0,
        shuffle: bool = True,
        chunk_start: np.ndarray | None = None,
        closes: np.ndarray | None = None,
        question_weight: float = 1.0,
    ) -> None:
        """chunk_start: (t,) bool where the chunks of the corpus start, if that is known already

        closes: (documents,) bool which of them end with their last byte; None: all
        question_weight: what a nat of a question counts, one of an answer counts 1
        """
        if not len(corpus):
            raise ValueError(f"{corpus.name} holds no text")
        if window_bytes < 2 * chunker.max_bytes:  # else a window may hold the start of no chunk
            raise ValueError(
                f"data.window_bytes must be at least twice the longest chunk (chunking.max_bytes="
                f"{chunker.max_bytes}), got {window_bytes}"
            )
        self.corpus = corpus
        self.shuffle, self.seed, self.question_weight = shuffle, seed, question_weight
        self.lanes = lanes if shuffle else min(lanes, len(corpus))
        self.window_bytes = window_bytes
        self.closes = np.ones(len(corpus), bool) if closes is None else closes
        documents = list(corpus)
        self.characters = sum(count_characters(document.tobytes()) for document in documents)
        self.chunk_start = chunker.chunk_starts(documents) if chunk_start is None else chunk_start
        if corpus.question_bytes is not None:  # an answer starts a chunk, as what goes on from a prompt does
            answer_at = corpus.offsets[:-1] + corpus.question_bytes
            self.chunk_start = self.chunk_start.copy()
            self.chunk_start[answer_at[answer_at < corpus.offsets[1:]]] = True
        # (chunks + 1,) first byte of each chunk, then the end of the text
        self._chunk_at = np.append(np.flatnonzero(self.chunk_start), len(corpus.text))
        self._stream = lru_cache(maxsize=2)(self._make_stream)
        if shuffle:
            self.windows_per_epoch = -(-len(corpus.text) // (self.lanes * window_bytes))
        else:
            self._lane_at = _balanced_borders(corpus.offsets, self.lanes)  # (lanes + 1,)
            last_chunk = self._chunk_at[np.searchsorted(self._chunk_at, self._lane_at[1:]) - 1]
            self.windows_per_epoch = int((last_chunk - self._lane_at[:-1]).max()) // window_bytes + 1

    @property
    def chunks(self) -> int:
        """Chunks of the corpus; chunk_index lies below it."""
        return len(self._chunk_at) - 1

    def batch(self, step: int, first_row: int = 0, rows: int | None = None) -> Batch:
        """The batch of a step, or some of its rows, padded to the same (t, n) whatever the rows."""
        last_row = self.lanes if rows is None else first_row + rows
        if step < 0 or not 0 <= first_row < last_row <= self.lanes:
            raise ValueError(
                f"batch needs step >= 0 and rows within 0..{self.lanes}, got step {step} and "
                f"rows {first_row}..{last_row}"
            )
        epoch, window = divmod(step, self.windows_per_epoch)
        stream = self._stream(epoch)
        begin, end = (self._first_chunk_from(edge, stream) for edge in self._edges(window))  # (lanes,)

        # where in the stream every byte lies, then where in the corpus
        length = end - begin
        column = np.arange(length.max())
        is_valid = column < length[:, None]  # (lanes t)
        place = np.where(is_valid, begin[:, None] + column, 0)
        turn = np.searchsorted(stream.start, place, side="right") - 1  # which document of the stream
        document = stream.order[turn]
        at = self.corpus.offsets[document] + place - stream.start[turn]

        chunk_start = self.chunk_start[at] & is_valid
        doc_start = (place == stream.start[turn]) & is_valid
        if window == 0:
            doc_start[:, 0] |= is_valid[:, 0]  # a stream may begin inside a document
        doc_end = (place == stream.start[turn + 1] - 1) & is_valid & self.closes[document]

        # chunk numbers, moved to the left of each row
        count = chunk_start.sum(axis=1)
        chunk_index = np.full((self.lanes, count.max()), -1)
        chunk_index[np.arange(count.max()) < count[:, None]] = np.searchsorted(
            self._chunk_at, at[chunk_start]
        )

        kept = slice(first_row, last_row)
        return Batch(
            bytes=torch.from_numpy(np.where(is_valid[kept], self.corpus.text[at[kept]], 0).astype(np.int64)),
            length=torch.from_numpy(length[kept]),
            doc_start=torch.from_numpy(doc_start[kept]),
            doc_end=torch.from_numpy(doc_end[kept]),
            chunk_start=torch.from_numpy(chunk_start[kept]),
            chunks=chunk_index.shape[1],
            chunk_index=torch.from_numpy(chunk_index[kept]),
            first_row=first_row,
            total_rows=self.lanes,
            total_bytes=int(length.sum()),
            weight=None if (weight := self._weights(chunk_index)) is None else weight[kept],
        )

    @cached_property
    def is_answer(self) -> np.ndarray | None:
        """(chunks,) bool: chunks that are no part of a question; None where there are no questions."""
        corpus, at = self.corpus, self._chunk_at[:-1]
        if corpus.question_bytes is None:
            return None
        answer_at = corpus.offsets[:-1] + corpus.question_bytes
        return at >= answer_at[np.searchsorted(corpus.offsets, at, side="right") - 1]

    def _weights(self, chunk_index: np.ndarray) -> Tensor | None:
        """`Batch.weight` of all streams: 1 in the mean over bytes; 0 where nothing counts. chunk_index: (lanes n)."""
        if self.is_answer is None or self.question_weight == 1:
            return None
        size = np.diff(self._chunk_at)[chunk_index] * (chunk_index >= 0)
        weight = np.where(self.is_answer, 1.0, self.question_weight)[chunk_index] * (chunk_index >= 0)
        mean = (weight * size).sum() / size.sum()
        return torch.from_numpy(weight / mean if mean else weight).float()

    def places(self, step: int) -> list[tuple[int, int] | None]:
        """Where each row of a step's batch begins: (document, byte of it); None for a row without text."""
        epoch, window = divmod(step, self.windows_per_epoch)
        stream = self._stream(epoch)
        begin, end = (self._first_chunk_from(edge, stream) for edge in self._edges(window))  # (lanes,)
        turn = np.minimum(np.searchsorted(stream.start, begin, side="right"), len(stream.order)) - 1
        document, byte = stream.order[turn].tolist(), (begin - stream.start[turn]).tolist()
        rows = zip(document, byte, (end > begin).tolist(), strict=True)
        return [(at, first) if has_text else None for at, first, has_text in rows]

    def _make_stream(self, epoch: int) -> _Stream:
        if not self.shuffle:
            return _Stream(np.arange(len(self.corpus)), self.corpus.offsets)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.corpus))
        size = np.diff(self.corpus.offsets)[order]
        return _Stream(order, np.concatenate([[0], np.cumsum(size)]))

    def _edges(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in the joined text (lanes,) where the window begins and ends, chunks not yet regarded."""
        if self.shuffle:
            pieces = self.lanes * self.windows_per_epoch
            piece = np.arange(self.lanes) * self.windows_per_epoch + window
            bytes_in_all = len(self.corpus.text)
            return piece * bytes_in_all // pieces, (piece + 1) * bytes_in_all // pieces
        begin = self._lane_at[:-1] + window * self.window_bytes
        end = begin + self.window_bytes
        return np.minimum(begin, self._lane_at[1:]), np.minimum(end, self._lane_at[1:])

    def _first_chunk_from(self, place: np.ndarray, stream: _Stream) -> np.ndarray:
        """The first place in the stream, from `place` on, where a chunk starts, or else its end."""
        turn = np.searchsorted(stream.start, place, side="right") - 1
        turn = np.minimum(turn, len(stream.order) - 1)  # the very end lies in no document
        shift = self.corpus.offsets[stream.order[turn]] - stream.start[turn]
        return self._chunk_at[np.searchsorted(self._chunk_at, place + shift)] - shift


def _balanced_borders(offsets: np.ndarray, lanes: int) -> np.ndarray:
    """Document borders (lanes + 1,) nearest to equal streams, each with at least one document."""
    documents = len(offsets) - 1
    wanted = np.arange(1, lanes) * offsets[-1] / lanes
    after = np.clip(np.searchsorted(offsets, wanted), 1, documents)
    nearest = np.where(wanted - offsets[after - 1] < offsets[after] - wanted, after - 1, after)
    # strictly rising and leaving a document for each stream to come: subtract the stream's number, sort out, add
    lane = np.arange(1, lanes)
    border = np.maximum.accumulate(np.maximum(nearest - lane, 0)) + lane
    border = np.minimum(border, documents - lanes + lane)
    return offsets[np.concatenate([[0], border, [documents]])]
