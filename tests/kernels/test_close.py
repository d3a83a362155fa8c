"""What a chunk leaves, in one call of C++, is what torch makes of it."""

from __future__ import annotations

import pytest
import torch

from hldm.kernels.close import close_chunk
from hldm.model.autoencoder import Autoencoder
from tests.generation.test_chunk import make_autoencoder, random_like

BYTES = 5  # of a chunk, at most


def random_chunks(autoencoder: Autoencoder, rows: int):
    """Features, lengths and which rows open a document; then a state as it may be after some text."""
    torch.manual_seed(rows)
    with torch.no_grad():
        autoencoder.normaliser.mean.normal_()
        autoencoder.normaliser.deviation.uniform_(0.5, 2.0)
    state = random_like(autoencoder.encoder_state(rows))
    features = torch.randn(rows, BYTES, autoencoder.settings.encoder.width)
    return features, torch.randint(1, BYTES + 1, (rows,)), torch.rand(rows, 1) < 0.3, state


@pytest.mark.parametrize("rows", [1, 3, 12, 40])
@pytest.mark.parametrize("kind", [dict(), dict(trunk_layers=2)])
def test_latent_and_trunk_are_the_same_in_one_call(plain_torch, kind, rows):
    autoencoder = make_autoencoder(reads_text=True, **kind)
    features, length, opens, state = random_chunks(autoencoder, rows)
    before = [part.clone() for block in state.trunk for part in block]
    with torch.no_grad():
        found = close_chunk(autoencoder, features, state.griffin, length, opens, state)
        torch.testing.assert_close([part for block in state.trunk for part in block], before, rtol=0, atol=0)
        with plain_torch():
            expected = autoencoder.close_chunk(features, state.griffin, length, opens, state)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
