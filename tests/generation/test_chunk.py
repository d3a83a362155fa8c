"""The bytes of a chunk: how many there may be, what is left alone, how symbols are picked."""

from __future__ import annotations

from copy import deepcopy
from types import ModuleType

import pytest
import torch
from torch.utils._pytree import tree_map

from hldm.config import AutoencoderConfig, ChunkingConfig, GenerationConfig, GriffinConfig
from hldm.generation import chunk
from hldm.generation.chunk import pick, write_chunks
from hldm.generation.writer import row_generators
from hldm.model.autoencoder import Autoencoder
from hldm.model.state import pick_rows
from hldm.text.bytes import END_OF_DOCUMENT

SETTINGS = GenerationConfig(decoder_temperature=1.0)


def make_autoencoder(latent_dim: int = 3, width: int = 16, **settings) -> Autoencoder:
    """Every parameter away from 0, chunks of at most 5 bytes of which some end early."""
    torch.manual_seed(0)
    griffin = GriffinConfig(width=width, blocks=("recurrent", "attention"), heads=2)
    plain = dict(reads_text=False, trunk_layers=0, trunk_width=24, components=4)
    sections = dict(encoder=griffin, decoder=griffin) | plain | settings
    autoencoder = Autoencoder.from_settings(
        AutoencoderConfig(latent_dim=latent_dim, **sections),
        ChunkingConfig(strategy="words" if latent_dim else "fixed", min_bytes=2, max_bytes=5),
    )
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        autoencoder.outputs.bias[256:] += 3
        if latent_dim:
            autoencoder.normaliser.mean.normal_()
            autoencoder.normaliser.deviation.uniform_(0.5, 2.0)
    return autoencoder.eval()


def random_like(state):
    """A state as it may be after some text."""
    return tree_map(
        lambda x: torch.rand(x.shape) < 0.5 if x.dtype == torch.bool else torch.randn(x.shape), state
    )


def write(
    autoencoder: Autoencoder, rows: int, settings: GenerationConfig = SETTINGS, form: ModuleType = chunk
):
    """Three rounds from a random state: pieces, and whatever is known after them.

    form: where `write_chunks` and `write_bytes` come from, the plain formulas or what does the same faster
    """
    torch.manual_seed(
        rows + 100
    )  # at `rows`, two symbols of one draw are as likely to 1e-9: their order is rounding
    opens = [row % 3 == 1 for row in range(rows)]
    generators = row_generators(5, rows)
    decoder = autoencoder.decoder_state(rows)
    decoder = decoder._replace(griffin=random_like(decoder.griffin))
    found = []
    with torch.no_grad():
        if not autoencoder.latent_dim:
            for _ in range(3):
                pieces, decoder = form.write_bytes(autoencoder, decoder, opens, settings, generators)
                opens = [piece.ends_document for piece in pieces]
                # what nobody reads may differ: states of documents that have ended, and keys of those before
                recurrent, (keys, values, live) = pick_rows(decoder.griffin, ~torch.tensor(opens))
                seen = live[..., None, None]
                found += [pieces, recurrent, keys * seen, values * seen, live]
            return found
        encoder = random_like(autoencoder.encoder_state(rows))
        for _ in range(3):
            latent = torch.randn(rows, autoencoder.latent_dim)
            written = form.write_chunks(autoencoder, latent, encoder, decoder, opens, settings, generators)
            opens = [piece.ends_document for piece in written.pieces]
            encoder, decoder = written.encoder, written.decoder
            found.append(written)
    return found


def test_the_states_that_were_passed_in_are_left_alone():
    autoencoder = make_autoencoder(reads_text=True, carry_state=True)
    encoder, decoder = random_like(autoencoder.encoder_state(2)), autoencoder.decoder_state(2)
    before = deepcopy((encoder, decoder))
    with torch.no_grad():
        write_chunks(
            autoencoder, torch.randn(2, 3), encoder, decoder, [True, False], SETTINGS, row_generators(0, 2)
        )
    torch.testing.assert_close((encoder, decoder), before, rtol=0, atol=0)


@pytest.mark.parametrize(("bias", "length"), [(100.0, 1), (-100.0, 5)])
def test_no_chunk_is_empty_or_too_long(bias, length):
    autoencoder = make_autoencoder()
    autoencoder.outputs.bias.data[256:] = bias
    assert {len(piece.text) for written in write(autoencoder, 12) for piece in written.pieces} == {length}


def test_the_twin_stops_where_its_document_ends():
    autoencoder = make_autoencoder(0, carry_state=True)
    autoencoder.outputs.bias.data[END_OF_DOCUMENT] = 100.0
    pieces, *_ = write(autoencoder, 3)
    assert all(piece.text == b"" and piece.ends_document for piece in pieces)


def test_nucleus_and_temperature_pick_as_they_should():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(1000, 3)
    u = (torch.arange(1000) + 0.5) / 1000
    counts = torch.bincount(pick(logits, u, 1.0, 1.0), minlength=3)
    assert (counts - torch.tensor([500, 300, 200])).abs().max() <= 1
    counts = torch.bincount(pick(logits, u, 1.0, 0.6), minlength=3)
    assert (counts - torch.tensor([625, 375, 0])).abs().max() <= 1
    assert pick(logits, u, 0.0, 1.0).eq(0).all()
