"""Two ranks read a file to its end through a stream, as a training does, with nothing in the place of its steps.

    accelerate launch --multi_gpu --num_processes 2 --module tests.training.stream_worker FILE FOLDER

Each leaves rank-N.json in the folder: the numbers of the documents it read, its resident memory as it went, and whether
a stream that was gone on with in the middle gave the same batches.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from hldm.chunking.chunker import make_chunker
from hldm.config import ChunkingConfig, DataConfig, LoggingConfig, TrainingConfig
from hldm.sources.corpora import load_corpora
from hldm.sources.shards import open_source
from hldm.text.windows import Batch
from hldm.training.stage import make_accelerator
from hldm.training.stream import StreamedWindows, agreement, gathered

SAMPLES = 40  # of the memory
LANES, WINDOW = 64, 2048


def generate(path: Path, size: int) -> int:
    """A file of so many bytes of numbered documents; returns how many."""
    random = np.random.default_rng(0)
    words = np.array(["river", "stone", "the", "of", "morning", "letter", "a", "walked", "über", "and"])
    pages = [" ".join(random.choice(words, size=int(n))) for n in random.integers(20, 1500, 200)]
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            written += file.write(f'{{"text": "{number} {pages[number * 7 % 200]}"}}\n')
            number += 1
    return number


def numbers(batch: Batch) -> list[int]:
    """Of the documents that start in a batch."""
    starts = batch.doc_start.nonzero().tolist()
    opened = (bytes(batch.bytes[row, at : at + 10].tolist()) for row, at in starts)
    return [
        int(text.strip(b"\0").split(b" ", 1)[0]) for text in opened
    ]  # padded where a row ends with the number


def digest(batch: Batch) -> str:
    found = hashlib.sha256()
    for array in (batch.bytes, batch.length, batch.doc_start, batch.doc_end, batch.chunk_start):
        found.update(array.numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    began = time.monotonic()
    data = DataConfig(path=str(path), stream=True, readers=2, lanes=LANES, window_bytes=WINDOW)
    corpora = load_corpora(data)
    accelerator = make_accelerator(TrainingConfig(), LoggingConfig(), str(folder))
    rank, ranks = accelerator.process_index, accelerator.num_processes
    chunker = make_chunker(ChunkingConfig())

    def open_stream() -> StreamedWindows:
        shared = {"rank": rank, "ranks": ranks, "agree": agreement(accelerator)}
        return StreamedWindows(open_source(data), corpora["train"], chunker, data, seed=0, **shared)

    windows, rows = open_stream(), LANES // ranks

    def batch(step: int) -> Batch:
        return windows.batch(step, rank * rows, rows)

    steps = int(0.85 * path.stat().st_size) // (
        LANES * WINDOW
    )  # less than a pass: some documents are held out
    read: list[int] = []
    resident, is_exact, first = [], False, 0.0
    for step in range(steps):
        read += numbers(batch(step))
        first = first or time.monotonic() - began
        if step == steps // 2:  # stop, and go on: once to compare, once to train
            cursor = gathered(accelerator, windows.cursor())["stream"]
            after = [digest(batch(step + 1 + i)) for i in range(3)]
            for is_compared in (True, False):
                windows.close()
                windows = open_stream()
                windows.seek(step + 1, cursor)
                if is_compared:
                    is_exact = [digest(batch(step + 1 + i)) for i in range(3)] == after
        if step % max(steps // SAMPLES, 1) == 0:
            resident.append(psutil.Process().memory_info().rss)
    windows.close()
    found = {"read": read, "resident": resident, "is_exact": is_exact, "steps": steps}
    found |= {"seconds": time.monotonic() - began, "seconds_to_first": first}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main()
