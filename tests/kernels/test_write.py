"""A chunk in one call of C++ is the chunk that torch writes event by event, states included."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from hldm.config import changed
from hldm.generation import chunk
from hldm.kernels import write as fused
from hldm.text.bytes import END_OF_DOCUMENT
from tests.generation.test_chunk import SETTINGS, make_autoencoder, write

pytestmark = pytest.mark.usefixtures("plain_torch")  # skips where there are no kernels
TRUNK = dict(trunk_layers=1)
KINDS = [
    dict(),
    dict(carry_state=True),
    dict(reads_text=True),
    TRUNK,
    dict(reads_text=True, **TRUNK),
    dict(carry_state=True, reads_text=True, trunk_layers=2),
    dict(pooling="strided", **TRUNK),
]


def assert_same(found, expected):
    for ours, plain in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
        else:
            assert ours == plain


@pytest.mark.parametrize("rows", [1, 3, 12, 40])
@pytest.mark.parametrize("kind", [*KINDS, dict(latent_dim=0, carry_state=True)])
def test_one_call_writes_what_torch_writes(plain_torch, kind, rows):
    autoencoder = make_autoencoder(**kind)
    found = write(autoencoder, rows, form=fused)
    with plain_torch():
        assert_same(found, write(autoencoder, rows, form=chunk))


@pytest.mark.parametrize(
    "settings", [dict(decoder_temperature=0.0), dict(top_p=0.7), dict(decoder_temperature=0.5)]
)
@pytest.mark.parametrize("latent_dim", [0, 3])
def test_temperature_and_nucleus_are_the_same_in_one_call(plain_torch, latent_dim, settings):
    autoencoder = make_autoencoder(latent_dim, carry_state=True, width=32)
    settings = changed(SETTINGS, **settings)
    found = write(autoencoder, 9, settings, form=fused)
    with plain_torch():
        assert_same(found, write(autoencoder, 9, settings, form=chunk))


@pytest.mark.parametrize("latent_dim", [0, 3])
def test_the_floor_under_the_bytes_is_the_same_in_one_call(plain_torch, latent_dim):
    autoencoder = make_autoencoder(latent_dim, carry_state=True, width=32)
    without = write(autoencoder, 40, form=fused)
    autoencoder.byte_floor = 0.3
    found = write(autoencoder, 40, form=fused)
    assert found[0] != without[0]
    with plain_torch():
        assert_same(found, write(autoencoder, 40, form=chunk))


def test_rows_are_the_same_on_more_threads():
    autoencoder, before = make_autoencoder(reads_text=True), torch.get_num_threads()
    one = write(autoencoder, 40, form=fused)
    try:
        torch.set_num_threads(3)
        three = write(autoencoder, 40, form=fused)
    finally:
        torch.set_num_threads(before)
    assert_same(one, three)


@pytest.mark.parametrize(("bias", "length"), [(100.0, 1), (-100.0, 5)])
def test_no_chunk_is_empty_or_too_long(bias, length):
    autoencoder = make_autoencoder()
    autoencoder.outputs.bias.data[256:] = bias
    written = write(autoencoder, 12, form=fused)
    assert {len(piece.text) for chunks in written for piece in chunks.pieces} == {length}


def test_the_twin_stops_where_its_document_ends():
    autoencoder = make_autoencoder(0, carry_state=True)
    autoencoder.outputs.bias.data[END_OF_DOCUMENT] = 100.0
    pieces, *_ = write(autoencoder, 3, form=fused)
    assert all(piece.text == b"" and piece.ends_document for piece in pieces)
