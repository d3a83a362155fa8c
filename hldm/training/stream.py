"""Training batches from text that is streamed: `hldm.text.windows.Windows` for a source without end.

    readers (hldm.sources.stream) ── documents, cut into chunks as they come ── streams ── batches, made ahead

Reader i of R feeds streams i L / R to (i + 1) L / R - 1 of the L (`data.lanes`) of the global batch: a stream that runs
out takes the reader's next document. A rank holds the readers of its own streams and reads nothing else, so what a
batch holds depends on data.readers, never on how many ranks share it. A row of a batch is whole chunks, at least
window_bytes in all. Batches are made ahead in a thread.

The cursor that goes with every batch is the state of the stream after it: where each reader is, and what is left of
the document in each stream, with its cuts. A checkpoint keeps it (`gathered`), and training goes on from it to the bit,
on any number of processes that divides data.readers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load, save
from torch import Tensor

from hldm.chunking.chunker import Chunker
from hldm.config import ConfigError, DataConfig
from hldm.sources.shards import Source
from hldm.sources.stream import Cursor, Reader
from hldm.text.corpus import Corpus
from hldm.text.windows import Batch

AHEAD = 8  # batches that are made before they are asked for
POLL_S = 0.2  # between two looks of the thread at whether it is still wanted

Agree = Callable[[Sequence[int]], list[list[int]]]  # some numbers of this rank -> those of every rank


class Lane(NamedTuple):
    """What is left of the document that a stream of the batch is in."""

    text: np.ndarray = np.zeros(0, np.uint8)  # (t) the document
    is_start: np.ndarray = np.zeros(0, bool)  # (t) where its chunks start
    at: int = 0  # how much of it has been read


class Piece(NamedTuple):
    """A stretch of one document in a row."""

    text: np.ndarray  # (t) uint8
    is_start: np.ndarray  # (t) bool
    opens: bool  # the document starts with it
    ends: bool  # or ends


class Ready(NamedTuple):
    """A batch of this rank's streams, padded to the longest of them, and the state of all after it."""

    arrays: dict[str, np.ndarray]  # bytes, doc_start, doc_end, chunk_start (b t); length, count (b)
    readers: tuple[Cursor, ...]
    lanes: tuple[Lane, ...]


class StreamedWindows:
    """Batches of a stream, one after another."""

    def __init__(
        self,
        source: Source,
        corpus: Corpus,
        chunker: Chunker,
        data: DataConfig,
        *,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        agree: Agree = lambda numbers: [list(numbers)],
    ) -> None:
        """corpus: the beginning of its training text;  agree: gathers numbers of all ranks

        Raises ConfigError unless readers are shared evenly, and where there are too few shards for them.
        """
        if data.readers % ranks:
            raise ConfigError(
                f"data.readers must be a multiple of the processes, got {data.readers} and {ranks} processes: set "
                f"data.readers={ranks * -(-data.readers // ranks)}, or launch {data.readers}"
            )
        if data.window_bytes < 2 * chunker.max_bytes:
            raise ValueError(
                f"data.window_bytes must be at least twice the longest chunk (chunking.max_bytes="
                f"{chunker.max_bytes}), got {data.window_bytes}"
            )
        self.source, self.corpus, self.chunker, self.data = source, corpus, chunker, data
        self.lanes, self.agree = data.lanes, agree
        each, share = data.readers // ranks, data.lanes // ranks
        self.readers = [Reader(source, data, index=rank * each + i, seed=seed) for i in range(each)]
        self.first_lane, self.own_lanes = rank * share, share
        self.state = Ready(
            {}, tuple(r.cursor for r in self.readers), (Lane(),) * share
        )  # after the last batch
        self.step = -1  # of the last batch
        self._agreed = (0, 0, 0)  # of it, over all ranks: widest row, most chunks, bytes in all
        self._queue: queue.Queue[Ready | BaseException] = queue.Queue(AHEAD)
        self._thread: threading.Thread | None = None
        self._is_closed = threading.Event()

    # ---- what training asks

    @property
    def chunks(self) -> int:
        """Chunks of `corpus`."""
        return int(self.chunker.chunk_starts(list(self.corpus)).sum())

    @property
    def identity(self) -> dict[str, str]:
        """What a training that goes on must find unchanged."""
        return {"corpus": self.corpus.fingerprint, "stream": self.source.fingerprint}

    def batch(self, step: int, first_row: int = 0, rows: int | None = None) -> Batch:
        """Rows of this rank of a step's batch, padded alike on all ranks. Steps come one after another."""
        rows = self.lanes - first_row if rows is None else rows
        own = slice(first_row - self.first_lane, first_row - self.first_lane + rows)
        if not 0 <= own.start < own.stop <= self.own_lanes or step not in (self.step, self.step + 1):
            raise ValueError(
                f"a stream gives rows {self.first_lane}..{self.first_lane + self.own_lanes} of step {self.step + 1}, "
                f"got rows {first_row}..{first_row + rows} of step {step}"
            )
        if step > self.step:
            self.state, self.step = self._next(), step
            length, count = self.state.arrays["length"], self.state.arrays["count"]
            told = self.agree([int(length.max()), int(count.max()), int(length.sum())])
            self._agreed = (
                max(t for t, _, _ in told),
                max(n for _, n, _ in told),
                sum(b for _, _, b in told),
            )
        width, chunks, total = self._agreed
        arrays = {name: torch.from_numpy(array[own]) for name, array in self.state.arrays.items()}
        sizes = arrays.pop("length")
        del arrays["count"]
        padded = {name: torch.nn.functional.pad(x, (0, width - x.shape[1])) for name, x in arrays.items()}
        return Batch(
            **padded,
            length=sizes,
            chunks=chunks,
            chunk_index=torch.full((rows, chunks), -1),  # a stream does not number its chunks
            first_row=first_row,
            total_rows=self.lanes,
            total_bytes=total,
        )

    def places(self, step: int) -> list[str]:
        """Where the readers of this rank are: a row holds what they gave its stream some time before."""
        return [
            f"reader {reader.index}: pass {cursor.epoch}, part {cursor.shard}, block {cursor.block}"
            for reader, cursor in zip(self.readers, self.state.readers, strict=True)
        ]

    def cursor(self) -> dict[str, Tensor]:
        """The state of this rank's part of the stream after the last batch, by names that no other rank has."""
        found = {
            f"reader-{reader.index}": torch.tensor(cursor)
            for reader, cursor in zip(self.readers, self.state.readers, strict=True)
        }
        for number, lane in enumerate(self.state.lanes, start=self.first_lane):
            found[f"lane-{number}-text"] = torch.tensor(lane.text[lane.at :])
            found[f"lane-{number}-start"] = torch.tensor(lane.is_start[lane.at :])
            found[f"lane-{number}-opened"] = torch.tensor(lane.at > 0)
        return found

    def seek(self, step: int, saved: dict[str, Tensor]) -> None:
        """Go on after so many steps from what `cursor` gave on all ranks."""
        self.close()
        self._is_closed.clear()
        self._queue = queue.Queue(AHEAD)
        if f"reader-{self.readers[0].index}" not in saved:
            raise ConfigError("the checkpoint holds no place in a stream: choose another --name")
        lanes = []
        for number in range(self.first_lane, self.first_lane + self.own_lanes):
            text, is_start, opened = (
                saved[f"lane-{number}-{part}"].numpy() for part in ("text", "start", "opened")
            )
            # a byte before those that are left, so that they do not open a document
            pad = int(bool(opened) and len(text) > 0)
            lanes.append(Lane(np.pad(text, (pad, 0)), np.pad(is_start, (pad, 0)), pad))
        for reader in self.readers:
            reader.seek(Cursor(*saved[f"reader-{reader.index}"].tolist()))
        self.state, self.step = Ready({}, tuple(r.cursor for r in self.readers), tuple(lanes)), step - 1

    def close(self) -> None:
        """End the thread."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # ---- what the thread does

    def _next(self) -> Ready:
        """The next batch. Raises what went wrong as it was made."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, args=(self.state.lanes,), name="stream", daemon=True
            )
            self._thread.start()
        found = self._queue.get()
        if isinstance(found, BaseException):
            self.close()
            raise found
        return found

    def _work(self, lanes: tuple[Lane, ...]) -> None:
        while not self._is_closed.is_set():
            made: Ready | BaseException
            try:
                made = self._make(lanes)
                lanes = made.lanes
            except BaseException as error:  # raised again where the batch is asked for
                made = error
            while not self._is_closed.is_set():
                try:
                    self._queue.put(made, timeout=POLL_S)
                    break
                except queue.Full:
                    continue
            if isinstance(made, BaseException):
                return

    def _make(self, lanes: tuple[Lane, ...]) -> Ready:
        """The batch after the one that left the streams in this state."""
        each = self.own_lanes // len(self.readers)
        rows, after = [], []
        for number, lane in enumerate(lanes):
            pieces, lane = self._row(lane, self.readers[number // each])
            rows.append(pieces)
            after.append(lane)
        return Ready(_arrays(rows), tuple(reader.cursor for reader in self.readers), tuple(after))

    def _row(self, lane: Lane, reader: Reader) -> tuple[list[Piece], Lane]:
        """Whole chunks, window_bytes or a few more in all."""
        pieces, missing = [], self.data.window_bytes
        while missing > 0:
            if lane.at == len(lane.text):
                document = np.frombuffer(reader.next_document(), np.uint8)
                lane = Lane(document, self.chunker.chunk_starts([document]))
            text, is_start, at = lane
            stop = at + missing
            if stop < len(text):
                later = np.flatnonzero(is_start[stop : stop + self.chunker.max_bytes + 4])
                stop = stop + int(later[0]) if len(later) else len(text)
            stop = min(stop, len(text))
            pieces.append(Piece(text[at:stop], is_start[at:stop], at == 0, stop == len(text)))
            missing -= stop - at
            lane = lane._replace(at=stop)
        return pieces, lane


def _arrays(rows: Sequence[Sequence[Piece]]) -> dict[str, np.ndarray]:
    """Rows of pieces as a batch's arrays."""
    length = np.array([sum(len(piece.text) for piece in pieces) for pieces in rows])
    shape = len(rows), int(length.max())
    found: dict[str, np.ndarray] = {"bytes": np.zeros(shape, np.int64)}
    found |= {name: np.zeros(shape, bool) for name in ("doc_start", "doc_end", "chunk_start")}
    for row, pieces in enumerate(rows):
        at = 0
        for piece in pieces:
            stop = at + len(piece.text)
            found["bytes"][row, at:stop] = piece.text
            found["chunk_start"][row, at:stop] = piece.is_start
            found["doc_start"][row, at] = piece.opens
            found["doc_end"][row, stop - 1] = piece.ends
            at = stop
    return found | {"length": length, "count": found["chunk_start"].sum(axis=1)}


def agreement(accelerator: Accelerator) -> Agree:
    """How the ranks of an accelerator exchange numbers."""

    def agree(numbers: Sequence[int]) -> list[list[int]]:
        told = accelerator.gather(torch.tensor([numbers], device=accelerator.device))
        return [[int(number) for number in row] for row in told.tolist()]

    return agree


def gathered(accelerator: Accelerator, own: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The named tensors of all ranks, on every rank, as a checkpoint's stream; no two ranks share a name."""
    if not own:
        return {}
    if accelerator.num_processes == 1:
        return {"stream": own}
    packed = torch.frombuffer(bytearray(save(own)), dtype=torch.uint8).to(accelerator.device)
    sizes = accelerator.gather(torch.tensor([len(packed)], device=accelerator.device)).tolist()
    room = torch.nn.functional.pad(packed, (0, max(sizes) - len(packed)))
    parts: Any = accelerator.gather(room[None]).cpu().numpy()
    found: dict[str, Tensor] = {}
    for part, size in zip(parts, sizes, strict=True):
        found |= load(part[:size].tobytes())
    return {"stream": found}
