"""Stacks of every shape are in C++ what they are in torch, their weights those of the moment."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.utils._pytree import tree_leaves

from hldm.config import GriffinConfig
from hldm.generation import chunk
from hldm.generation.pipeline import read_pipeline
from hldm.kernels import write as fused
from hldm.model.autoencoder import Autoencoder
from hldm.runs.folder import shipped_run
from tests.generation.test_chunk import make_autoencoder, write

BLOCKS = ("recurrent", "attention", "recurrent")


@pytest.fixture(autouse=True)
def with_kernels(plain_torch):
    """Only where there are kernels."""


def make_model(width: int = 32, blocks: tuple[str, ...] = BLOCKS, **settings) -> Autoencoder:
    """Encoder and decoder are such stacks, which carry their states from chunk to chunk."""
    griffin = GriffinConfig(width=width, heads=4, blocks=blocks, **settings)
    return make_autoencoder(reads_text=True, carry_state=True, encoder=griffin, decoder=griffin)


def assert_as_in_torch(model: Autoencoder, rows: int) -> None:
    """Chunks, features and states."""
    found, expected = (tree_leaves(write(model, rows, form=form)) for form in (fused, chunk))
    for ours, plain in zip(found, expected, strict=True):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
        else:
            assert ours == plain


@pytest.mark.parametrize("rows", [1, 3, 17, 40])
@pytest.mark.parametrize(
    ("width", "settings"),
    [
        (128, {}),
        (160, {"mlp_ratio": 1.3}),  # widths of heads and of the MLP that no vector divides
        (48, {"blocks": ("attention",)}),
        (16, {"blocks": ("recurrent",)}),
        (16, {"blocks": ("recurrent", "recurrent")}),
    ],
)
def test_stacks_of_every_shape_agree_with_torch(width, settings, rows):
    assert_as_in_torch(make_model(width, **settings), rows)


def test_weights_are_those_of_the_moment():
    model, other = make_model(), make_model()
    write(model, 1, form=fused)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    changes = (
        lambda: [p.data.mul_(0.9) for p in model.parameters()],
        lambda: model.load_state_dict(other.state_dict()),
        lambda: model.load_state_dict(make_model().state_dict(), assign=True),
        lambda: model.double().float(),
    )
    for change in changes:
        change()
        assert_as_in_torch(model, 2)
    copied = deepcopy(model)
    with torch.no_grad():
        model.decoder.norm.scale.add_(1)
    assert_as_in_torch(model, 2)
    assert_as_in_torch(copied, 2)


@pytest.mark.parametrize("twin", [False, True])
def test_the_shipped_models_write_the_same_text_as_in_torch(plain_torch, twin):
    pipeline = read_pipeline(shipped_run(twin) / "pipeline")

    def text() -> list[str]:
        return pipeline(["And the king said", "In the beginning"], max_characters=60, seed=3).texts

    ours = text()
    with plain_torch():
        assert text() == ours
