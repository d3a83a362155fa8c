"""Bits by distance and by context: chunks in their buckets, documents cut without losing a byte, known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hldm.config import AutoencoderConfig, ChunkingConfig, GriffinConfig
from hldm.evaluation.bound import evaluate_bound, held_out_windows
from hldm.evaluation.context_length import Places, by_distance, compare_contexts, cut_documents
from hldm.model.autoencoder import Autoencoder
from hldm.text.corpus import Corpus, make_corpus

GRIFFIN = GriffinConfig(width=16, blocks=("recurrent", "attention"), heads=2)
EVERY = 60


@pytest.fixture(scope="module")
def twin() -> Autoencoder:
    torch.manual_seed(0)
    chunking = ChunkingConfig(strategy="fixed", min_bytes=1, max_bytes=40)
    return Autoencoder.from_settings(AutoencoderConfig(latent_dim=0, decoder=GRIFFIN), chunking).eval()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    words = ["sun", "naïve", "river", "of", "stone", "and", "日本", "light"]
    return make_corpus("words", (" ".join(rng.choice(words, count)).encode() for count in (7, 300, 80)))


@pytest.fixture
def windows(twin, corpus):
    return held_out_windows(twin, corpus)


def test_every_chunk_is_in_the_bucket_of_its_distance(windows):
    places = Places.of(windows)
    assert places.characters.sum() == windows.characters
    bits = np.where(places.distance < 100, 1.0, np.where(places.distance < 1000, 2.0, 3.0))
    found = by_distance(bits * places.characters * math.log(2), windows)
    assert [value and value["bits_per_character"] for value in found.values()] == [
        pytest.approx(1),
        pytest.approx(2),
        pytest.approx(3),
        None,
    ]
    assert sum(value["characters"] for value in found.values() if value) == windows.characters
    assert found["0"]["standard_error"] == pytest.approx(0)
    assert found["1000"]["standard_error"] is None  # of one document


def test_documents_are_cut_at_chunks_and_nothing_is_lost(twin, corpus, windows):
    cut = cut_documents(windows, EVERY)
    assert bytes(cut.text) == bytes(corpus.text)
    assert set(corpus.offsets) < set(cut.offsets) and windows.chunk_start[cut.offsets[:-1]].all()
    sizes = np.diff(cut.offsets)
    assert sizes.max() < EVERY + windows.chunk_start.size and sizes.max() <= EVERY + 12
    pieces = held_out_windows(twin, cut, windows.chunk_start)
    assert (Places.of(pieces).start == Places.of(windows).start).all()


def test_a_piece_is_read_as_if_the_text_began_there(twin, windows):
    def nats(windows):
        return evaluate_bound(twin, None, windows, generator=torch.Generator()).by_chunk

    whole = nats(windows)
    pieces = held_out_windows(twin, cut_documents(windows, EVERY), windows.chunk_start)
    cut = nats(pieces)
    is_last = np.append(np.diff(Places.of(pieces).document) != 0, True)
    is_first_piece = Places.of(windows).distance < EVERY
    same = np.isclose(whole, cut, rtol=1e-4)
    assert same[is_first_piece & ~is_last].all()
    assert same[~is_first_piece].mean() < 0.1
    # one after another gives what all together give
    alone = make_corpus("alone", [bytes(pieces.corpus.document(3))])
    chunks = Places.of(pieces).document == 3
    assert nats(held_out_windows(twin, alone)).sum() == pytest.approx(cut[chunks].sum(), rel=1e-4)


def test_what_far_context_saves_is_counted_where_little_is_left(twin, windows):
    pieces = held_out_windows(twin, cut_documents(windows, EVERY), windows.chunk_start)
    here, places = Places.of(pieces), Places.of(windows)
    whole = 2 * places.characters * math.log(2)
    # half a bit more where a piece has at least half of its bytes; elsewhere what must not count
    more = np.where(here.distance >= EVERY / 2, 0.5, 100.0)
    more[np.append(np.diff(here.document) != 0, True) | (places.distance < EVERY)] = 1000.0
    cut = whole + more * places.characters * math.log(2)
    found = compare_contexts(whole, cut, windows, pieces, EVERY)
    assert (found["whole"], found["bits_per_character"]) == (pytest.approx(2), pytest.approx(2.5))
    assert (found["saved"], found["standard_error"]) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9))
    assert 0.2 * windows.characters < found["characters"] < 0.5 * windows.characters


def test_documents_shorter_than_the_context_have_nothing_to_compare(twin, windows):
    cut = cut_documents(windows, 10_000)
    assert (cut.offsets == windows.corpus.offsets).all()
    pieces = held_out_windows(twin, cut, windows.chunk_start)
    nats = np.ones(windows.chunks)
    assert compare_contexts(nats, nats, windows, pieces, 10_000) is None
