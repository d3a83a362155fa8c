from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hldm.chunking.chunker import make_chunker, segments
from hldm.config import ChunkingConfig
from hldm.text.corpus import Corpus, make_corpus
from hldm.text.windows import Windows, cache_latents, load_latents

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
        count = segments(batch.chunk_start, batch.length).count
        assert (count == (batch.chunk_index >= 0).sum(dim=1)).all()
        assert batch.chunk_index.shape[1] == count.max()


@settings(max_examples=30, deadline=None)
@given(corpus=corpora, layout=layouts, data=st.data())
def test_rows_of_a_batch_equal_the_whole_batch(corpus, layout, data):
    windows = windows_of(corpus, **layout)
    step = data.draw(st.integers(0, 3 * windows.windows_per_epoch))
    first = data.draw(st.integers(0, windows.lanes - 1))
    rows = data.draw(st.integers(1, windows.lanes - first))
    whole, part = windows.batch(step), windows.batch(step, first, rows)
    assert (part.first_row, part.total_rows) == (first, windows.lanes)
    for name in ("bytes", "length", "doc_start", "doc_end", "chunk_start", "chunk_index"):
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
        assert all(map(torch.equal, again.batch(step)[:6], expected[step][:6]))
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


# ---- cached latents

BINDING = {"autoencoder": "0123", "corpus": "4567", "chunking": {"strategy": "words", "max_bytes": 8}}


def first_bytes(batch) -> torch.Tensor:
    """A latent (b n 2) that tells chunks apart: the number of the chunk and its first byte."""
    first = torch.full(batch.chunk_index.shape, -1)
    first[batch.chunk_index >= 0] = batch.bytes[batch.chunk_start]
    return torch.stack([batch.chunk_index, first], dim=-1).float()


@pytest.fixture
def cached(tmp_path):
    windows = windows_of(random_corpus(documents=10), shuffle=False)
    path = tmp_path / "cache" / "latents.safetensors"
    cache_latents(first_bytes, windows, path, BINDING)
    return windows, path


def test_cached_latents_stand_at_their_chunk_index(cached):
    windows, path = cached
    latents = load_latents(path, BINDING)
    assert latents.dtype == np.float32 and latents.shape == (windows.chunks, 2)
    assert (latents[:, 0] == np.arange(windows.chunks)).all()
    assert (latents[:, 1] == windows.corpus.text[windows.chunk_start]).all()
    shuffled = windows_of(windows.corpus, shuffle=True).batch(3)
    is_chunk = shuffled.chunk_index >= 0
    assert (latents[shuffled.chunk_index[is_chunk]] == first_bytes(shuffled)[is_chunk].numpy()).all()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_cached_latents_are_a_safetensors_file(cached):
    from safetensors.numpy import load_file

    assert (load_file(cached[1])["latents"] == load_latents(cached[1], BINDING)).all()


@pytest.mark.parametrize(
    "key, value", [("autoencoder", "x"), ("chunking", {"strategy": "fixed"}), ("new", 1)]
)
def test_stale_latents_are_refused(cached, key, value):
    with pytest.raises(ValueError, match=rf"stale: made for {key}=.*delete the file") as error:
        load_latents(cached[1], {**BINDING, key: value})
    assert "\n" not in str(error.value)


@settings(max_examples=300, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(tmp_path_factory, where, bit):
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    windows = windows_of(random_corpus(documents=1, words=20), shuffle=False)
    cache_latents(first_bytes, windows, path, BINDING)
    load_latents(path, BINDING)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(ValueError, match="delete the file"):
        load_latents(path, BINDING)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused(cached, share):
    data = cached[1].read_bytes()
    cached[1].write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="delete the file"):
        load_latents(cached[1], BINDING)


def test_missing_latents_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cached latents"):
        load_latents(tmp_path / "none.safetensors", BINDING)


@pytest.mark.parametrize(
    "encode, fault",
    [
        (lambda batch: first_bytes(batch) * float("nan"), "not finite"),
        (lambda batch: first_bytes(batch)[:, :-1], "must return latents"),
    ],
)
def test_bad_latents_are_never_written(cached, encode, fault):
    windows, path = cached
    before = path.read_bytes()
    with pytest.raises(ValueError, match=fault):
        cache_latents(encode, windows, path, BINDING)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_shuffled_windows_are_not_cached(tmp_path):
    with pytest.raises(ValueError, match="shuffle=False"):
        cache_latents(first_bytes, windows_of(random_corpus(5)), tmp_path / "x", BINDING)
