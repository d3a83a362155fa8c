"""Vectors of texts: a batch gives its texts', means are means over chunks, and each kind is what it says."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_model import tiny_pipeline

from hldm.chunking.reading import prompt_chunker
from hldm.text.windows import window_of

TEXTS = ["And the king said, Let us go up.", "naïve 日本 light", "x", "a" * 700 + " of stone and sun " * 60]
KINDS = ("latents", "summaries", "features")


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline(trunk_layers=1, trunk_width=16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_batch_gives_what_its_texts_give_one_by_one(pipeline, kind, batch_size):
    together = pipeline.encode(TEXTS, kind=kind, batch_size=batch_size)
    assert together.dtype == torch.float32 and together.numpy().shape == tuple(together.shape)
    for text, vector in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(pipeline.encode(text, kind=kind)[0], vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_is_the_mean_over_chunks(pipeline, kind):
    means, parts = (pipeline.encode(TEXTS, kind=kind, pooled=pooled) for pooled in (True, False))
    torch.testing.assert_close(means, torch.stack([part.mean(dim=0) for part in parts]))
    assert parts[2].shape == (1, means.shape[1])  # a text of one byte is one chunk


def test_each_kind_is_what_the_encoder_makes_of_a_chunk(pipeline):
    text = b"sun and light"
    autoencoder = pipeline.autoencoder
    starts = prompt_chunker(autoencoder).chunk_start(text)
    window = window_of([text], [starts], [True])
    with torch.no_grad():
        encoding, _ = autoencoder.encode(window, autoencoder.encoder_state(1))
    found = {kind: pipeline.encode(text, kind=kind, pooled=False)[0] for kind in KINDS}
    torch.testing.assert_close(found["latents"], encoding.latents[0])
    torch.testing.assert_close(found["summaries"], encoding.after[0])
    first, second = starts.nonzero()[0][:2]
    assert first == 0
    torch.testing.assert_close(found["features"][0], encoding.features[0, 1 : second + 1].mean(dim=0))


def test_unit_length_is_given_on_request(pipeline):
    torch.testing.assert_close(pipeline.encode(TEXTS, normalize=True).norm(dim=-1), torch.ones(len(TEXTS)))
    parts = pipeline.encode(TEXTS, normalize=True, pooled=False)
    assert all(torch.allclose(part.norm(dim=-1), torch.ones(len(part))) for part in parts)


def test_what_cannot_be_encoded_is_refused_in_one_line(pipeline):
    twin = tiny_pipeline(components=0, latent_dim=0, reads_text=False)
    bad = tiny_pipeline()
    torch.nn.init.constant_(bad.autoencoder.read.weight, math.nan)
    cases = [
        (lambda: twin.encode("a"), "the twin has no encoder"),
        (lambda: tiny_pipeline().encode("a", kind="summaries"), "no trunk"),
        (lambda: bad.encode("a"), "not finite"),
        (lambda: pipeline.encode("a", kind="vectors"), "kind must be one of latents, summaries, features"),
        (lambda: pipeline.encode("a", batch_size=0), "batch_size must be at least 1"),
        (lambda: pipeline.encode(["a", ""]), r"texts\[1\] is empty"),
        (lambda: pipeline.encode([]), "no text given"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()
