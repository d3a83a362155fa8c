"""Batches of a stream: whole documents lane by lane, the same whoever makes them, exact when gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from hldm.chunking.chunker import make_chunker
from hldm.config import ChunkingConfig, Config, ConfigError, DataConfig, changed, stage_training
from hldm.runs.checkpoints import newest_checkpoint
from hldm.runs.exits import Interrupted
from hldm.sources.corpora import load_corpora
from hldm.sources.shards import open_source
from hldm.sources.stream import split_of
from hldm.text.windows import Batch
from hldm.training import stage, stream
from hldm.training.stages import train_autoencoder, train_diffusion
from hldm.training.stream import StreamedWindows
from hldm.training.trainer import Trainer

LANES, WINDOW = 4, 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    """Several of them in a text of some KB."""
    monkeypatch.setattr("hldm.sources.stream.SHUFFLE_BYTES", 2000)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Some 60 KB in documents of 1 to 700 bytes."""
    random = np.random.default_rng(0)
    rows = (" ".join(f"{n}:{i}é" for i in range(random.integers(1, 120))) for n in range(300))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    sizes = {"lanes": LANES, "window_bytes": WINDOW, "readers": 2}
    return DataConfig(path=str(tmp_path / "text.jsonl"), stream=True, **sizes)


def windows_of(data: DataConfig, **arguments) -> StreamedWindows:
    source, corpora = open_source(data), load_corpora(data)
    return StreamedWindows(
        source, corpora["train"], make_chunker(ChunkingConfig()), data, seed=0, **arguments
    )


def take(windows: StreamedWindows, steps: range, first: int = 0, rows: int = LANES) -> list[Batch]:
    try:
        return [windows.batch(step, first, rows) for step in steps]
    finally:
        windows.close()


def texts_of(batch: Batch) -> list[bytes]:
    return [bytes(row[:n].tolist()) for row, n in zip(batch.bytes, batch.length, strict=True)]


def assert_equal(one: Batch, other: Batch) -> None:
    for name in ("bytes", "length", "doc_start", "doc_end", "chunk_start", "chunk_index"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.chunks, one.first_row, one.total_bytes) == (other.chunks, other.first_row, other.total_bytes)


def test_a_lane_reads_whole_documents_cut_as_they_are_alone(data):
    batches = take(windows_of(data), range(60))
    chunker = make_chunker(ChunkingConfig())
    read = []
    for lane in range(LANES):
        text = b"".join(texts_of(batch)[lane] for batch in batches)
        flags = {
            name: torch.cat([getattr(batch, name)[lane, : batch.length[lane]] for batch in batches]).numpy()
            for name in ("doc_start", "doc_end", "chunk_start")
        }
        starts, ends = np.flatnonzero(flags["doc_start"]), np.flatnonzero(flags["doc_end"])
        assert starts[0] == 0 and (starts[1:] == ends[: len(starts) - 1] + 1).all()
        for start, stop in pairwise(starts):
            document = text[start:stop]
            assert (flags["chunk_start"][start:stop] == chunker.chunk_start(document)).all()
            assert split_of(document, data.held_out) == "train"
            read.append(document)
    assert len(read) > 20 and len(read) == len(set(read))  # in 60 steps no lane is through
    for batch in batches:
        assert ((batch.length >= WINDOW) & (batch.length < WINDOW + 10)).all()
        assert batch.chunk_start[:, 0].all() and batch.total_bytes == int(batch.length.sum())
        assert batch.chunks == int(batch.count.max()) and batch.bytes.shape[1] == int(batch.length.max())


@pytest.mark.parametrize("stopped", [1, 7, 40])
def test_it_goes_on_exactly_from_the_cursor_of_a_batch(data, stopped):
    straight = take(windows_of(data), range(60))
    first = windows_of(data)
    take(first, range(stopped))
    again = windows_of(data)
    again.seek(stopped, first.cursor())
    for one, other in zip(straight[stopped:], take(again, range(stopped, 60)), strict=True):
        assert_equal(one, other)
    with pytest.raises(ConfigError, match="holds no place in a stream"):
        again.seek(3, {})


def two_ranks(
    data: DataConfig, steps: range, cursor: dict[str, torch.Tensor] | None = None
) -> list[list[Batch]]:
    """What each of two ranks takes, side by side, and tells the other."""
    told: dict[int, list[int]] = {}
    barrier = threading.Barrier(2, timeout=60)
    found: dict[int, list[Batch]] = {}
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        def agree(numbers):
            told[rank] = list(numbers)
            barrier.wait()
            both = [told[0], told[1]]
            barrier.wait()
            return both

        try:
            windows = windows_of(data, rank=rank, ranks=2, agree=agree)
            if cursor is not None:
                windows.seek(steps.start, cursor)
            found[rank] = take(windows, steps, rank * LANES // 2, LANES // 2)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return [found[0], found[1]]


def test_two_ranks_read_disjoint_text_and_together_what_one_process_reads(data):
    one = take(windows_of(data), range(40))
    both = two_ranks(data, range(40))
    seen: list[set[bytes]] = []
    for rank, batches in enumerate(both):
        rows = slice(rank * 2, rank * 2 + 2)
        for whole, part in zip(one, batches, strict=True):
            assert torch.equal(whole.bytes[rows], part.bytes) and torch.equal(
                whole.doc_end[rows], part.doc_end
            )
            assert torch.equal(whole.chunk_start[rows], part.chunk_start) and part.total_rows == LANES
            assert (whole.total_bytes, whole.chunks) == (part.total_bytes, part.chunks)
        seen.append({text[:20] for batch in batches for text in texts_of(batch)})
    assert not seen[0] & seen[1]


def test_two_ranks_go_on_with_what_one_process_began(data):
    one = windows_of(data)
    straight = take(one, range(30))
    begun = windows_of(data)
    take(begun, range(11))
    both = two_ranks(data, range(11, 30), begun.cursor())
    for whole, top, bottom in zip(straight[11:], *both, strict=True):
        assert torch.equal(whole.bytes, torch.cat([top.bytes, bottom.bytes]))


def test_batches_are_made_ahead_and_no_more_of_them_than_there_is_room_for(data, monkeypatch):
    made = []
    original = StreamedWindows._make

    def counted(self, lanes):
        made.append(threading.current_thread().name)
        return original(self, lanes)

    monkeypatch.setattr(StreamedWindows, "_make", counted)
    windows = windows_of(data)
    windows.batch(0)
    deadline = time.monotonic() + 20
    while len(made) < 1 + stream.AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    windows.close()
    assert 1 + stream.AHEAD <= len(made) <= 2 + stream.AHEAD and set(made) == {"stream"}


def test_what_goes_wrong_ahead_is_raised_when_its_batch_is_asked_for(data):
    windows = windows_of(data)
    calls = []

    def fails(documents):
        calls.append(1)
        if len(calls) == 30:
            raise OSError("the cable was pulled")
        return make_chunker(ChunkingConfig()).chunk_starts(documents)

    windows.chunker.chunk_starts = fails
    with pytest.raises(OSError, match="the cable was pulled"):
        for step in range(100):
            windows.batch(step)
    assert step > 2 and windows._thread is None


def test_steps_come_one_after_another_and_ranks_share_readers_evenly(data):
    windows = windows_of(data)
    with pytest.raises(ValueError, match="of step 0, got rows 0..4 of step 3"):
        windows.batch(3)
    with pytest.raises(
        ConfigError, match="multiple of the processes, got 2 and 4 processes: set data.readers=4"
    ):
        windows_of(data, ranks=4)
    with pytest.raises(ValueError, match="at least twice the longest chunk"):
        windows_of(changed(data, window_bytes=8))


# ---- training on it


@pytest.fixture
def streamed(small_config: Config) -> Config:
    """configs/tiny.yaml, much smaller, its text streamed by two readers."""
    return changed(small_config, data=changed(small_config.data, stream=True, readers=2))


@pytest.mark.parametrize("strategy", ["words", pytest.param("entropy", marks=pytest.mark.slow)])
def test_a_stage_that_is_interrupted_goes_on_to_the_same_bits(
    tmp_path, streamed, strategy, monkeypatch, small_segmenters
):
    monkeypatch.setattr(stage, "cached_starts", None)  # nothing is cut before it is read
    chunking = changed(streamed.chunking, strategy=strategy)
    config = stage_training(changed(streamed, chunking=chunking), "autoencoder", steps=14)
    straight = train_autoencoder(config, root=tmp_path / "straight")
    original, steps = Trainer.step, []

    def step_then_signal(self: Trainer, progress: float) -> dict[str, float] | None:
        steps.append(progress)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, progress)

    monkeypatch.setattr(Trainer, "step", step_then_signal)
    with pytest.raises(Interrupted):
        train_autoencoder(config, root=tmp_path / "stopped")
    resumed = train_autoencoder(config, resume=True, root=tmp_path / "stopped")
    one, other = (newest_checkpoint(folder / "autoencoder") for folder in (straight, resumed))
    assert one is not None and other is not None and one.step == other.step == 14
    assert one.tensors.keys() == other.tensors.keys() >= {"stream", "model"}
    for stem in one.tensors:
        torch.testing.assert_close(one.tensors[stem], other.tensors[stem], rtol=0, atol=0)


def test_both_stages_train_on_a_stream_and_its_held_out_text_is_measured(tmp_path, streamed):
    from hldm.runs.folder import corpora_of_run

    config = stage_training(stage_training(streamed, "autoencoder", steps=4), "prior", steps=4)
    train_autoencoder(config, root=tmp_path)
    run = train_diffusion(config, root=tmp_path)
    saved = newest_checkpoint(run / "prior")
    assert saved is not None and {"reader-0", "reader-1", "lane-3-text"} <= saved.tensors["stream"].keys()
    assert len(corpora_of_run(run)["test"]) > 0


def test_a_source_that_was_changed_is_not_gone_on_with(tmp_path, streamed):
    text = tmp_path / "text.txt"
    text.write_bytes(Path(streamed.data.path).read_bytes())
    config = changed(streamed, data=changed(streamed.data, path=str(text)))
    train_autoencoder(stage_training(config, "autoencoder", steps=3), root=tmp_path)
    text.write_bytes(text.read_bytes() + b"\n\nand more text at its end, far from the beginning")
    with pytest.raises(ConfigError, match="was trained with (corpus|stream)"):
        train_autoencoder(config, resume=True, root=tmp_path)


@pytest.mark.slow
def test_two_processes_train_on_a_stream_what_one_does_and_go_on(tmp_path, streamed):
    plain = _overrides(streamed)
    runs = {}
    for name, processes, steps in (("one", 1, 12), ("one", 1, 30), ("two", 2, 12), ("two", 2, 30)):
        command = [str(ROOT / "train_autoencoder.py"), "--config", str(ROOT / "configs/tiny.yaml"), *plain]
        command += ["--name", name, "--steps", str(steps), *(["--resume"] if steps == 30 else [])]
        if processes == 2:
            port = str(29_500 + os.getpid() % 1000)
            launch = ["--multi_gpu", "--num_processes", "2", "--main_process_port", port]
            command = ["-m", "accelerate.commands.launch", *launch, *command]
        ran = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-3000:]
        runs[name] = tmp_path / "runs" / name / "autoencoder"
    found = [
        [
            line["decoder"] + line["latent"]
            for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if "decoder" in line
        ]
        for run in runs.values()
    ]
    assert len(found[0]) == 30 and found[0] == pytest.approx(found[1], abs=1e-4)
    one, two = (newest_checkpoint(run) for run in runs.values())
    assert one is not None and two is not None
    for name, tensor in one.tensors["stream"].items():
        assert torch.equal(tensor, two.tensors["stream"][name]), name


@pytest.mark.slow
def test_a_hundred_megabytes_through_two_ranks_take_no_more_memory_as_they_go(tmp_path):
    from tests.training.stream_worker import generate

    documents = generate(tmp_path / "text.jsonl", 100_000_000)
    port = ["--main_process_port", str(29_500 + os.getpid() % 1000)]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *port]
    worker = ["--module", "tests.training.stream_worker", str(tmp_path / "text.jsonl"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, *launch, *worker],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    seen = [set(rank["read"]) for rank in ranks]
    assert not seen[0] & seen[1] and all(
        len(s) == len(rank["read"]) for s, rank in zip(seen, ranks, strict=True)
    )
    assert len(seen[0] | seen[1]) > 0.8 * documents
    for rank in ranks:
        assert rank["is_exact"]
        settled = rank["resident"][len(rank["resident"]) // 4 :]
        assert max(settled) < 1.05 * min(settled), settled


def _overrides(config: Config) -> list[str]:
    from conftest import SMALL

    kept = ("path", "readers")
    found = [*SMALL, 'data.separator="\\n\\n"', "data.stream=true"]
    return [*found, *(f"data.{key}={getattr(config.data, key)}" for key in kept)]
