"""A draft changes how fast text is written, never which."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hldm.config import GenerationConfig, changed
from hldm.generation.draft import ChunkDraft, Draft, TextDraft
from hldm.generation.writer import row_generators
from hldm.kernels.write import Writing
from hldm.text.bytes import END_OF_DOCUMENT
from tests.generation.test_chunk import SETTINGS, make_autoencoder

pytestmark = pytest.mark.usefixtures("plain_torch")  # skips where there are no kernels
KINDS = [
    dict(reads_text=True, trunk_layers=1),
    dict(carry_state=True, reads_text=True, trunk_layers=2),
    dict(trunk_layers=1, pooling="strided"),
    dict(),
    dict(latent_dim=0, carry_state=True),
]
ROUNDS = 12


def texts(autoencoder, settings: GenerationConfig = SETTINGS, *, rows: int = 1, seed: int = 0, **options):
    """Pieces of some rounds, states after them, and the counts of what was guessed."""
    torch.manual_seed(seed)
    generators, opens, found = row_generators(seed, rows), [True] * rows, []
    with torch.no_grad():
        encoder = autoencoder.encoder_state(rows) if autoencoder.latent_dim else None
        if options.get("draft") is not None:
            options["texts"] = [b""] * rows
        writing = Writing(autoencoder, encoder, autoencoder.decoder_state(rows), settings, **options)
        for _ in range(ROUNDS):
            if encoder is None:
                pieces = writing.stretches(opens, generators)
            else:
                pieces, _ = writing.chunks(torch.randn(rows, autoencoder.latent_dim), opens, generators)
            opens = [piece.ends_document for piece in pieces]
            found.append(pieces)
    return found, writing


def chunk_draft(strings, autoencoder, seed: int = 0) -> ChunkDraft:
    """One that finds each of the strings likeliest here or there."""
    strings = sorted(set(strings))
    terms = torch.randn(
        2 * autoencoder.latent_dim + 1, len(strings), generator=torch.Generator().manual_seed(seed)
    )
    text = torch.frombuffer(bytearray(b"".join(strings)), dtype=torch.uint8)
    return ChunkDraft("", terms, text, torch.from_numpy(np.cumsum([0, *map(len, strings)])))


def text_draft(text: bytes) -> TextDraft:
    """What follows the last two bytes, and the last one, at their last place in the text."""
    follows = {}
    for order in (1, 2):
        for i in range(order, len(text)):
            follows[order << 56 | int.from_bytes(text[i - order : i], "big")] = text[i]
    keys = sorted(follows)
    following = torch.tensor([follows[key] for key in keys], dtype=torch.uint8)
    return TextDraft("", torch.tensor(keys), following)


def good_draft(autoencoder, written) -> Draft:
    """One that knows what will be written."""
    pieces = [piece.text for row in written for piece in row if piece.text]
    return chunk_draft(pieces, autoencoder) if autoencoder.latent_dim else text_draft(b"".join(pieces))


def bad_draft(autoencoder) -> Draft:
    """One that knows nothing."""
    generator = np.random.default_rng(0)
    noise = [generator.bytes(int(generator.integers(1, 9))) for _ in range(300)]
    return chunk_draft(noise, autoencoder) if autoencoder.latent_dim else text_draft(b"".join(noise))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes", [{}, dict(decoder_temperature=0.0), dict(decoder_temperature=0.7), dict(top_p=0.8)]
)
def test_a_draft_good_or_bad_leaves_every_byte_and_state_as_it_is(kind, changes):
    autoencoder, settings = make_autoencoder(**kind), changed(SETTINGS, **changes)
    for seed in range(3):
        plain, before = texts(autoencoder, settings, seed=seed, alone=True)
        for draft in (good_draft(autoencoder, plain), bad_draft(autoencoder)):
            found, after = texts(autoencoder, settings, seed=seed, alone=True, draft=draft)
            assert found == plain
            assert after.counts[1] == before.counts[1] and after.counts[0] <= before.counts[0]
            for one, other in zip(before.decoder.griffin, after.decoder.griffin, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            if before.encoder is not None and after.encoder is not None:
                assert torch.equal(before.encoder.feature, after.encoder.feature)
                assert torch.equal(before.encoder.known, after.encoder.known)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_that_knows_the_text_saves_passes(kind):
    autoencoder = make_autoencoder(**kind)
    plain, before = texts(autoencoder, alone=True)
    _, after = texts(autoencoder, alone=True, draft=good_draft(autoencoder, plain))
    assert after.counts[3] > 0 and after.counts[0] < before.counts[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_alone_are_the_rows_together(kind, rows):
    autoencoder = make_autoencoder(**kind)
    together, _ = texts(autoencoder, rows=rows)
    alone, _ = texts(autoencoder, rows=rows, alone=True)
    assert alone == together


@pytest.mark.parametrize("bias", [100.0, -100.0])
def test_ends_that_come_at_once_or_never_are_the_same_with_a_draft(bias):
    for kind in (KINDS[0], KINDS[-1]):
        autoencoder = make_autoencoder(**kind)
        autoencoder.outputs.bias.data[END_OF_DOCUMENT if not autoencoder.latent_dim else 256] = bias
        plain, _ = texts(autoencoder, alone=True)
        found, _ = texts(autoencoder, alone=True, draft=bad_draft(autoencoder))
        assert found == plain


def test_guesses_are_those_of_the_plain_formulas():
    autoencoder = make_autoencoder(reads_text=True)
    draft = chunk_draft([b"and", b"any", b"b", b"bee"], autoencoder)
    latent = torch.randn(3)
    best = draft.guess(latent, b"an")
    assert best == max((b"and", b"any"), key=lambda s: float(draft.scores(latent)[draft.strings.index(s)]))
    assert draft.guess(latent, b"x") is None
    known = text_draft(b"abcabd")
    assert (known.guess(b"ab"), known.guess(b"zb"), known.guess(b"z")) == (ord("d"), ord("d"), None)
