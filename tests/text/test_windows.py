from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hldm.chunking.chunker import make_chunker
from hldm.config import ChunkingConfig
from hldm.text.corpus import Corpus, make_corpus
from hldm.text.windows import Window, Windows, window_of

TENSORS = ("bytes", "length", "doc_start", "doc_end", "chunk_start", "chunk_index")
WORDS = np.array([b"a", b"the", b"lamp", b"\xc3\xa9t\xc3\xa9", b"morning", b"whatsoever", b"\xff"])


def random_corpus(documents: int, words: int = 40, seed: int = 0) -> Corpus:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 2 * words, documents)
    return make_corpus("random", [b" ".join(random.choice(WORDS, size).tolist()) for size in sizes])


def windows_of(corpus: Corpus, strategy: str = "words", **settings) -> Windows:
    config = ChunkingConfig(strategy=strategy, min_bytes=3, max_bytes=8)
    return Windows(corpus, make_chunker(config), **{"lanes": 4, "window_bytes": 32, **settings})


def lanes_of(windows: Windows, epoch: int = 0) -> list[dict[str, np.ndarray]]:
    """Every lane of an epoch read through, its windows joined."""
    batches = [windows.batch(epoch * windows.windows_per_epoch + k) for k in range(windows.windows_per_epoch)]
    lanes = []
    for row in range(windows.lanes):
        parts = {name: [] for name in ("bytes", "doc_start", "doc_end", "chunk_start", "chunk_index")}
        for batch in batches:
            for name, part in parts.items():
                value = getattr(batch, name)[row]
                part.append(value[value >= 0] if name == "chunk_index" else value[: batch.length[row]])
        lanes.append({name: torch.cat(part).numpy() for name, part in parts.items()})
    return lanes


def random_window(b: int, t: int, seed: int) -> Window:
    """Chunks of about three bytes; the first row full, the last one empty, padding anything."""
    generator = torch.Generator().manual_seed(seed)
    chunk_start = torch.rand(b, t, generator=generator) < 0.3
    chunk_start[:, 0] = True
    length = torch.randint(1, t + 1, (b,), generator=generator)
    length[0], length[-1] = t, 0
    chunk_start &= torch.arange(t) < length[:, None]
    doc_start = chunk_start & (torch.rand(b, t, generator=generator) < 0.5)
    return Window(
        bytes=torch.randint(256, (b, t), generator=generator),
        length=length,
        doc_start=doc_start,
        doc_end=torch.zeros_like(doc_start),
        chunk_start=chunk_start,
        chunks=int(chunk_start.sum(dim=1).max()),
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_window_knows_where_its_chunks_lie(seed):
    window = random_window(b=4, t=13, seed=seed)
    for row in range(4):
        length = int(window.length[row])
        starts = [t for t in range(length) if window.chunk_start[row, t]]
        assert window.count[row] == len(starts) == window.is_chunk[row].sum()
        for n, (begin, end) in enumerate(zip(starts, [*starts, length][1:], strict=True)):
            assert (window.chunk_id[row, begin:end] == n).all()
            assert window.place[row, begin:end].tolist() == list(range(end - begin))
            assert window.chunk_end[row, begin:end].tolist() == [False] * (end - begin - 1) + [True]
            assert (window.first_byte[row, n], window.last_byte[row, n]) == (begin, end - 1)
            assert window.opens_document[row, n] == window.doc_start[row, begin]
        assert window.is_real[row].tolist() == [t < length for t in range(13)]
        assert (window.chunk_id[row, length:] == -1).all()
        assert not window.opens_document[row, len(starts) :].any()


def test_texts_of_any_length_make_a_window():
    starts = [np.array([True, False, False, True, False]), np.array([], bool), np.array([True])]
    window = window_of(["aé b".encode(), b"", b"c"], starts, [True, True, False])
    assert (window.length.tolist(), window.chunks, window.count.tolist()) == ([5, 0, 1], 2, [2, 0, 1])
    assert window.doc_start.nonzero().tolist() == [[0, 0]] and not window.doc_end.any()
    assert int(window.characters) == 5
    wide = window_of([b"c"], starts[2:], [False], width=7, chunks=3)
    assert (wide.bytes.shape, wide.is_chunk.tolist()) == ((1, 7), [[True, False, False]])


def test_shapes_that_disagree_are_refused():
    window = random_window(b=3, t=11, seed=0)
    for name, wrong in (("length", window.length[:2]), ("doc_end", window.doc_end[:, :5])):
        with pytest.raises(ValueError, match="length is"):
            replace(window, **{name: wrong})


corpora = st.builds(random_corpus, st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
layouts = st.fixed_dictionaries(
    {"lanes": st.integers(1, 9), "window_bytes": st.integers(16, 64), "shuffle": st.booleans()}
)


@settings(max_examples=60, deadline=None)
@given(corpus=corpora, layout=layouts, strategy=st.sampled_from(["words", "fixed"]), epoch=st.integers(0, 2))
def test_an_epoch_holds_every_chunk_once_and_whole(corpus, layout, strategy, epoch):
    windows = windows_of(corpus, strategy, **layout)
    lanes = lanes_of(windows, epoch)
    index = np.concatenate([lane["chunk_index"] for lane in lanes])
    assert sorted(index) == list(range(windows.chunks))
    first = np.flatnonzero(windows.chunk_start)
    for lane in lanes:  # the bytes of a lane are those of its chunks
        starts = np.flatnonzero(lane["chunk_start"])
        for chunk, piece in zip(lane["chunk_index"], np.split(lane["bytes"], starts[1:]), strict=False):
            assert (corpus.text[first[chunk] : first[chunk] + len(piece)] == piece).all()
    assert sum(len(lane["bytes"]) for lane in lanes) == len(corpus.text)
    assert sum(lane["doc_end"].sum() for lane in lanes) == len(corpus)


@settings(max_examples=60, deadline=None)
@given(corpus=corpora, layout=layouts)
def test_the_start_signals_keep_their_promises(corpus, layout):
    windows = windows_of(corpus, **layout)
    for lane in lanes_of(windows):
        assert not len(lane["bytes"]) or lane["doc_start"][0]
        assert not (lane["doc_start"] & ~lane["chunk_start"]).any()
        assert (lane["doc_start"][1:] == lane["doc_end"][:-1]).all()
    for step in range(windows.windows_per_epoch):
        batch = windows.batch(step)
        assert 0 < batch.length.max() == batch.bytes.shape[1] < layout["window_bytes"] + 8
        is_padded = torch.arange(batch.bytes.shape[1]) >= batch.length[:, None]
        for signal in (batch.bytes, batch.doc_start, batch.doc_end, batch.chunk_start):
            assert not signal[is_padded].any()
        assert (batch.chunk_start[:, 0] == (batch.length > 0)).all()
        assert (batch.is_chunk == (batch.chunk_index >= 0)).all()
        assert batch.chunk_index.shape[1] == batch.chunks == batch.count.max()


@settings(max_examples=30, deadline=None)
@given(corpus=corpora, layout=layouts, data=st.data())
def test_rows_of_a_batch_equal_the_whole_batch(corpus, layout, data):
    windows = windows_of(corpus, **layout)
    step = data.draw(st.integers(0, 3 * windows.windows_per_epoch))
    first = data.draw(st.integers(0, windows.lanes - 1))
    rows = data.draw(st.integers(1, windows.lanes - first))
    whole, part = windows.batch(step), windows.batch(step, first, rows)
    assert (part.first_row, part.total_rows) == (first, windows.lanes)
    for name in TENSORS:
        assert torch.equal(getattr(part, name), getattr(whole, name)[first : first + rows])


@settings(max_examples=30, deadline=None)
@given(corpus=corpora, layout=layouts, step=st.integers(0, 40))
def test_where_a_row_begins_is_told_by_document_and_byte(corpus, layout, step):
    windows = windows_of(corpus, **layout)
    batch, places = windows.batch(step), windows.places(step)
    assert len(places) == windows.lanes
    for row, place in enumerate(places):
        if place is None:
            assert batch.length[row] == 0
            continue
        document, byte = place
        length = min(int(batch.length[row]), len(corpus.document(document)) - byte)
        expected = corpus.document(document)[byte : byte + length]
        assert length > 0 and (batch.bytes[row, :length].numpy() == expected).all()


def test_the_order_is_a_function_of_seed_and_step_alone():
    corpus = random_corpus(documents=20)
    windows, again = windows_of(corpus, seed=1), windows_of(corpus, seed=1)
    steps = range(3 * windows.windows_per_epoch)
    expected = {step: windows.batch(step) for step in steps}
    for step in reversed(steps):
        found = again.batch(step)
        assert all(torch.equal(getattr(found, name), getattr(expected[step], name)) for name in TENSORS)
    streams = [
        np.concatenate([lane["bytes"] for lane in lanes_of(windows_of(corpus, seed=seed), epoch)]).tobytes()
        for seed, epoch in [(1, 0), (1, 1), (2, 0)]
    ]
    assert len(set(streams)) == 3


@settings(max_examples=60, deadline=None)
@given(corpus=corpora, lanes=st.integers(1, 40))
def test_evaluation_keeps_documents_whole_and_in_order(corpus, lanes):
    windows = windows_of(corpus, lanes=lanes, shuffle=False)
    assert windows.lanes == min(lanes, len(corpus))
    read = lanes_of(windows)
    assert (np.concatenate([lane["bytes"] for lane in read]) == corpus.text).all()
    for lane in read:
        assert lane["doc_end"][-1] and lane["doc_start"].sum() == lane["doc_end"].sum() >= 1


def test_evaluation_lanes_are_balanced():
    corpus = random_corpus(documents=200)
    lengths = [len(lane["bytes"]) for lane in lanes_of(windows_of(corpus, shuffle=False))]
    longest = int(np.diff(corpus.offsets).max())
    assert max(lengths) - min(lengths) <= 2 * longest


def test_training_windows_are_equally_long():
    windows = windows_of(random_corpus(documents=50))
    lengths = [windows.batch(step).length for step in range(2 * windows.windows_per_epoch)]
    assert torch.stack(lengths).min() > 32 / 2 - 8


def test_characters_are_counted_in_utf8():
    corpus = make_corpus("two", ["été 世".encode(), b"a\xff"])
    assert windows_of(corpus).characters == 5 + 2


def test_a_batch_moves_whole():
    batch = windows_of(random_corpus(documents=5)).batch(0)
    moved = batch.to("meta")
    assert moved.bytes.device.type == moved.chunk_index.device.type == "meta"
    assert moved.total_rows == batch.total_rows


def test_a_batch_is_built_in_two_milliseconds():
    windows = windows_of(random_corpus(documents=1000, words=200), lanes=16, window_bytes=512)
    windows.batch(0)
    times = []
    for step in range(20):
        start = time.process_time()
        windows.batch(step)
        times.append(time.process_time() - start)
    assert min(times) < 2e-3


@pytest.mark.parametrize("ask", [dict(step=-1), dict(step=0, first_row=4), dict(step=0, first_row=2, rows=3)])
def test_a_batch_that_is_not_there_is_refused(ask):
    with pytest.raises(ValueError, match="rows"):
        windows_of(random_corpus(documents=5)).batch(**ask)


def test_windows_shorter_than_two_chunks_are_refused():
    with pytest.raises(ValueError, match=r"data\.window_bytes .* twice"):
        windows_of(random_corpus(documents=5), window_bytes=15)
