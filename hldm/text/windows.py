"""A corpus laid out for training: lanes of whole chunks, read window by window.

A lane is one long text, documents in a row; a batch is the same window of every lane, so recurrent state
carries from one batch to the next. Every batch is a pure function of (seed, step): nothing to save, nothing
to replay on resume, and the same batch on any number of machines. Also here: latents computed once and kept
on disk for stage two. Bytes only; knows no model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hldm.chunking.chunker import Chunker
from hldm.runs.files import naming
from hldm.runs.machine import require_disk
from hldm.text.bytes import count_characters
from hldm.text.corpus import Corpus


class Batch(NamedTuple):
    """One window of every lane; rows hold whole chunks and are padded on the right."""

    bytes: Tensor  # (b t) int64, 0 where padded
    length: Tensor  # (b,) int64 valid bytes of each row; 0 where a lane has run out
    doc_start: Tensor  # (b t) bool: the first byte of a document or of a lane, resets the state
    doc_end: Tensor  # (b t) bool: the last byte of a document
    chunk_start: Tensor  # (b t) bool: the first byte of a chunk
    chunk_index: Tensor  # (b n) int64 number of each chunk in the corpus, -1 where padded
    first_row: int  # which rows of the global batch these are ...
    total_rows: int  # ... out of how many
    total_bytes: int  # in all rows of the window, not only these

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        tensors = {name: part for name, part in self._asdict().items() if isinstance(part, Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
        return self._replace(**moved)


class _Stream(NamedTuple):
    """The documents of an epoch in a row."""

    order: np.ndarray  # (documents,) which document comes when
    start: np.ndarray  # (documents + 1,) where each begins in the stream


class Windows:
    """Batches of a corpus, each a pure function of (seed, step).

    shuffle=True (training): every epoch permutes the documents, and the stream they make is cut into
    lanes x windows_per_epoch pieces of equal length, at most window_bytes. shuffle=False (evaluation):
    corpus order, lanes cut between documents only, windows of window_bytes. Either way a chunk belongs to
    the piece that holds its first byte, so every byte of an epoch appears once, and a row is at most
    window_bytes + max_bytes - 1 long.
    """

    def __init__(
        self,
        corpus: Corpus,
        chunker: Chunker,
        *,
        lanes: int,
        window_bytes: int,
        seed: int = 0,
        shuffle: bool = True,
        chunk_start: np.ndarray | None = None,
    ) -> None:
        """chunk_start: (t,) bool where the chunks of the corpus start, if that is known already."""
        if not len(corpus):
            raise ValueError(f"{corpus.name} holds no text")
        if window_bytes < 2 * chunker.max_bytes:  # else a window may hold the start of no chunk
            raise ValueError(
                f"data.window_bytes must be at least twice the longest chunk (chunking.max_bytes="
                f"{chunker.max_bytes}), got {window_bytes}"
            )
        self.corpus = corpus
        self.shuffle = shuffle
        self.seed = seed
        self.lanes = lanes if shuffle else min(lanes, len(corpus))
        self.window_bytes = window_bytes
        documents = [corpus.document(index) for index in range(len(corpus))]
        self.characters = sum(count_characters(document.tobytes()) for document in documents)
        self.chunk_start = chunker.chunk_starts(documents) if chunk_start is None else chunk_start
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
        at = self.corpus.offsets[stream.order[turn]] + place - stream.start[turn]

        chunk_start = self.chunk_start[at] & is_valid
        doc_start = (place == stream.start[turn]) & is_valid
        if window == 0:
            doc_start[:, 0] |= is_valid[:, 0]  # a lane may begin inside a document
        doc_end = (place == stream.start[turn + 1] - 1) & is_valid

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
            chunk_index=torch.from_numpy(chunk_index[kept]),
            first_row=first_row,
            total_rows=self.lanes,
            total_bytes=int(length.sum()),
        )

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
        """Places in the stream (lanes,) where the window begins and ends, chunks not yet regarded."""
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
    """Document borders (lanes + 1,) nearest to equal lanes, each lane holding at least one document."""
    documents = len(offsets) - 1
    wanted = np.arange(1, lanes) * offsets[-1] / lanes
    after = np.clip(np.searchsorted(offsets, wanted), 1, documents)
    nearest = np.where(wanted - offsets[after - 1] < offsets[after] - wanted, after - 1, after)
    # strictly rising and leaving a document for each lane to come: subtract the lane's number, sort out, add
    lane = np.arange(1, lanes)
    border = np.maximum.accumulate(np.maximum(nearest - lane, 0)) + lane
    border = np.minimum(border, documents - lanes + lane)
    return offsets[np.concatenate([[0], border, [documents]])]


# ---- cached latents

MAX_HEADER_BYTES = 1_000_000  # of a file of one tensor


def cache_latents(
    encode: Callable[[Batch], Tensor], windows: Windows, path: Path | str, binding: dict[str, object]
) -> None:
    """Write the latent of every chunk of a corpus, by chunk_index, to a safetensors file.

    encode: batch -> (b n z), called with the batches of one epoch in order, so it may carry state
    windows: of whole documents (shuffle=False);  path: replaced when complete, never before
    binding: what the latents depend on (autoencoder checksum, corpus fingerprint, chunking), as JSON values
    Raises ValueError for shuffled windows, a latent that is not finite or one of another shape, ConfigError
    when the disk has less room than the file will need.
    """
    if windows.shuffle:
        raise ValueError("cache_latents reads documents whole and in order: pass Windows(..., shuffle=False)")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path), partial.open("w+b") as file:
            _write_latents(file, encode, windows, binding, path)
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_latents(
    file: BinaryIO,
    encode: Callable[[Batch], Tensor],
    windows: Windows,
    binding: dict[str, object],
    path: Path,
) -> None:
    width = offset = 0
    for step in range(windows.windows_per_epoch):
        batch = windows.batch(step)
        latents = encode(batch).detach().float().cpu().numpy()  # (b n z)
        if step == 0:
            width = latents.shape[-1]
            offset = len(_header(windows.chunks, width, binding))
            require_disk(path, offset + 4 * windows.chunks * width, "set data.cache_latents=false")
        expected = (*batch.chunk_index.shape, width)
        if latents.shape != expected:
            raise ValueError(f"encode must return latents (b n z) = {expected}, got {latents.shape}")
        if not np.isfinite(latents[batch.chunk_index.numpy() >= 0]).all():
            raise ValueError(f"encode gave a latent that is not finite in window {step}")
        for index, row in zip(batch.chunk_index.numpy(), latents, strict=True):
            chunks = int((index >= 0).sum())  # numbered one after the other: lanes are in corpus order
            if chunks:
                file.seek(offset + int(index[0]) * width * 4)
                file.write(row[:chunks].astype("<f4").tobytes())
    head = _header(windows.chunks, width, binding, sha256=_sha256_from(file, offset))
    file.seek(0)
    file.write(head)
    file.flush()


def load_latents(path: Path | str, binding: dict[str, object]) -> np.ndarray:
    """Latents (chunks z) float32 by chunk_index, mapped from disk, read only.

    Raises FileNotFoundError where there are none, ValueError when they are damaged or were made for
    another binding.
    """
    path = Path(path)
    rebuild = "delete the file to have it rebuilt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no cached latents there; make them with cache_latents")
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            latents = file.get_slice("latents")
            (chunks, width), dtype, names = latents.get_shape(), latents.get_dtype(), file.keys()
            if (dtype, list(names)) != ("F32", ["latents"]):
                raise ValueError(f"it holds {', '.join(names)} and latents of {dtype}")
        made_for = dict(json.loads(metadata["binding"]))
        offset = path.stat().st_size - 4 * chunks * width
        with path.open("rb") as file:
            is_whole = metadata["sha256"] == _sha256_from(file, offset)
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a file of cached latents ({error}); {rebuild}") from None
    if not is_whole:
        raise ValueError(f"{path}: cached latents are damaged (their checksum differs); {rebuild}")
    wanted = json.loads(json.dumps(binding))
    for key in sorted(made_for.keys() | wanted.keys()):
        if made_for.get(key) != wanted.get(key):
            raise ValueError(
                f"{path}: cached latents are stale: made for {key}={made_for.get(key)}, this run has "
                f"{key}={wanted.get(key)}; {rebuild}"
            )
    stored = np.memmap(path, "<f4", mode="c", offset=offset, shape=(chunks, width))
    rows = 2**20 // max(width, 1) + 1  # at a time: the whole may be larger than memory
    if not all(np.isfinite(stored[first : first + rows]).all() for first in range(0, chunks, rows)):
        raise ValueError(f"{path}: not every cached latent is finite; {rebuild}")
    return stored


def _header(chunks: int, width: int, binding: dict[str, object], sha256: str = "0" * 64) -> bytes:
    """The head of a safetensors file that holds latents (chunks z); equally long for every checksum."""
    head = {
        "__metadata__": {"binding": json.dumps(binding, sort_keys=True), "sha256": sha256},
        "latents": {"dtype": "F32", "shape": [chunks, width], "data_offsets": [0, chunks * width * 4]},
    }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its data to 8 bytes
    return len(text).to_bytes(8, "little") + text


def _sha256_from(file: BinaryIO, offset: int) -> str:
    digest = hashlib.sha256()
    file.seek(offset)
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()
