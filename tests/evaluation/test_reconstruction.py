"""Reconstruction: counts that can be checked by hand, for a decoder that starts afresh and for a carried one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hldm.chunking.chunker import make_chunker
from hldm.config import AutoencoderConfig, ChunkingConfig, GriffinConfig
from hldm.evaluation import reconstruction
from hldm.evaluation.bound import held_out_windows
from hldm.model.autoencoder import Autoencoder
from hldm.text.bytes import END_OF_CHUNK
from hldm.text.corpus import make_corpus
from hldm.text.windows import Windows

CHUNKING = ChunkingConfig(strategy="fixed", min_bytes=4, max_bytes=4)


def make_autoencoder(carry_state: bool = False, chunking: ChunkingConfig = CHUNKING) -> Autoencoder:
    torch.manual_seed(0)
    griffin = GriffinConfig(width=32, blocks=("recurrent",), heads=2)
    settings = AutoencoderConfig(
        latent_dim=4,
        encoder=griffin,
        decoder=griffin,
        reads_text=False,
        trunk_layers=0,
        carry_state=carry_state,
    )
    return Autoencoder.from_settings(settings, chunking).eval()


def say_one_symbol(autoencoder: Autoencoder, symbol: int) -> None:
    """Make the decoder's likeliest symbol the same one always."""
    torch.nn.init.zeros_(autoencoder.outputs.weight)
    autoencoder.outputs.bias.data[:] = 0.0
    autoencoder.outputs.bias.data[symbol] = 2.0


def lay_out(text: bytes, chunking: ChunkingConfig = CHUNKING) -> Windows:
    corpus = make_corpus("text", [text, text])
    return Windows(corpus, make_chunker(chunking), lanes=2, window_bytes=8, shuffle=False)


def reconstruct(autoencoder: Autoencoder, windows: Windows) -> dict:
    return reconstruction.reconstruct(autoencoder, windows, -2.0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("carry_state", [False, True])
def test_symbols_and_chunks_are_right_where_they_are_likeliest(carry_state):
    autoencoder = make_autoencoder(carry_state)
    say_one_symbol(autoencoder, ord("a"))  # never an end, so no chunk is right
    found = reconstruct(autoencoder, lay_out(b"aaaabaabaaaa"))
    expected = {"byte_accuracy": 10 / (12 + 3), "chunk_accuracy": 0.0}
    assert found == expected | {"noisy": expected, "clean": expected, "chunks": 6}
    say_one_symbol(autoencoder, END_OF_CHUNK)
    found = reconstruct(autoencoder, lay_out(b"aaaabaabaaaa"))
    assert found["byte_accuracy"] == 2 / 15  # a document's end is another symbol


@pytest.mark.parametrize("carry_state", [False, True])
def test_reconstruction_is_the_same_however_the_text_is_laid_out(carry_state):
    chunking = ChunkingConfig()
    autoencoder = make_autoencoder(carry_state, chunking)
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(["sun", "river", "of", "stone"], 50)).encode() for _ in range(3)]
    corpus = make_corpus("words", documents)
    found = [
        reconstruct(
            autoencoder,
            Windows(corpus, make_chunker(chunking), lanes=lanes, window_bytes=size, shuffle=False),
        )
        for lanes, size in [(1, 64), (3, 1024)]
    ]
    assert found[0]["clean"] == found[1]["clean"]
    assert found[0]["chunks"] == found[1]["chunks"]


def test_a_long_text_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(reconstruction, "ENOUGH_CHUNKS", 6)
    assert reconstruct(make_autoencoder(), lay_out(b"word" * 50))["chunks"] == 8  # two windows of two lanes


def test_ends_cost_what_ending_and_going_on_are_not_expected():
    autoencoder = make_autoencoder(chunking=ChunkingConfig(strategy="fixed", min_bytes=3, max_bytes=3))
    torch.nn.init.zeros_(autoencoder.outputs.weight)
    autoencoder.outputs.bias.data[:] = 0.0
    windows = held_out_windows(autoencoder, make_corpus("x", ["abcdé".encode(), b"abc"]))
    # 258 symbols alike: 9 bytes go on, a chunk and two documents end; of 8 characters
    expected = (9 * math.log2(258 / 256) + 3 * math.log2(258 / 2)) / 8
    generator = torch.Generator().manual_seed(0)
    assert reconstruction.bits_of_ends(autoencoder, windows, generator) == pytest.approx(expected, rel=1e-5)
