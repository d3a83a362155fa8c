"""Latents on disk: each at its chunk's number, and refused when stale, damaged or not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hldm.training.latent_cache import cache_latents, load_latents
from tests.text.test_windows import random_corpus, windows_of

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
