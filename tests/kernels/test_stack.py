"""A position in one call of C++ is a position in torch, and leaves what it was given alone."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hldm.config import GriffinConfig
from hldm.generation.pipeline import read_pipeline
from hldm.kernels.stack import can_step
from hldm.model.griffin import Griffin
from hldm.runs.folder import shipped_run

BLOCKS = ("recurrent", "attention", "recurrent")
WINDOW = 5


@pytest.fixture(autouse=True)
def with_kernels(plain_torch):
    """Only where there are kernels."""


def make_griffin(width: int = 32, blocks: tuple[str, ...] = BLOCKS, **settings) -> Griffin:
    """A Griffin whose every parameter is away from 0."""
    torch.manual_seed(0)
    model = Griffin(GriffinConfig(width=width, heads=4, blocks=blocks, **settings), WINDOW)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def read(model: Griffin, b: int, t: int = 40) -> list[Tensor]:
    """Outputs of t positions one by one, where documents and chunks start at random, and the last state."""
    generator = torch.Generator().manual_seed(b)
    state, outputs = model.initial_state(b), []
    for _ in range(t):
        x = torch.randn(b, 1, model.config.width, generator=generator)
        doc_start = torch.rand(b, 1, generator=generator) < 0.1
        chunk_start = torch.rand(b, 1, generator=generator) < 0.2
        with torch.no_grad():
            y, state = model(x, state, doc_start, chunk_start)
        outputs.append(y)
    return [*outputs, *tree_leaves(state)]


@pytest.mark.parametrize("b", [1, 3, 17, 40])
@pytest.mark.parametrize(
    ("width", "settings"),
    [
        (128, {}),
        (160, {"mlp_ratio": 1.3}),  # widths of heads and of the MLP that no vector divides
        (48, {"blocks": ("attention",), "conv_width": 1}),
        (16, {"blocks": ("recurrent",), "conv_width": 1}),
        (16, {"blocks": ("recurrent", "recurrent"), "conv_width": 2}),
    ],
)
def test_many_steps_agree_with_torch(plain_torch, width, settings, b):
    model = make_griffin(width, **settings)
    ours = read(model, b)
    with plain_torch():
        plain = read(model, b)
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_are_the_same_on_more_threads():
    model, before = make_griffin(), torch.get_num_threads()
    one = read(model, 40)
    try:
        torch.set_num_threads(3)
        three = read(model, 40)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)


def test_the_state_that_was_passed_in_is_left_alone():
    model = make_griffin()
    state = tree_map(lambda part: torch.ones_like(part), model.initial_state(2))
    before = deepcopy(state)
    start = torch.tensor([[True], [False]])
    with torch.no_grad():
        assert can_step(model, torch.ones(2, 1, 32), state)
        model(torch.ones(2, 1, 32), state, start, start)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_weights_are_those_of_the_moment(plain_torch):
    model, other = make_griffin(), make_griffin()
    read(model, 1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    changes = (
        lambda: [p.data.mul_(0.9) for p in model.parameters()],
        lambda: model.load_state_dict(other.state_dict()),
        lambda: model.load_state_dict(make_griffin().state_dict(), assign=True),
        lambda: model.double().float(),
    )
    for change in changes:
        change()
        ours = read(model, 2, t=5)
        with plain_torch():
            torch.testing.assert_close(ours, read(model, 2, t=5), rtol=1e-5, atol=1e-5)
    copied = deepcopy(model)
    with torch.no_grad():
        model.norm.scale.add_(1)
    assert not torch.allclose(read(copied, 1, t=1)[0], read(model, 1, t=1)[0])


def test_what_it_cannot_do_is_left_to_torch():
    model, x = make_griffin(dropout=0.5), torch.ones(2, 1, 32)
    state = model.initial_state(2)
    assert not can_step(model, x, state)  # gradients
    with torch.no_grad():
        assert can_step(model, x, state)
        assert not can_step(model, torch.ones(2, 2, 32), state)
        assert not can_step(model, x.double(), state)
        assert not can_step(model, x, model.initial_state(3))
        assert not can_step(model, x, tree_map(lambda part: part.to(torch.bfloat16), state))
        assert not can_step(model, x[:0], model.initial_state(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not can_step(model, x, state)
        assert not can_step(model.train(), x, state)
        assert not can_step(model.eval().double(), x, state)


@pytest.mark.parametrize("twin", [False, True])
def test_the_shipped_models_write_the_same_text_as_in_torch(plain_torch, twin):
    pipeline = read_pipeline(shipped_run(twin) / "pipeline")

    def text() -> list[str]:
        return pipeline(["And the king said", "In the beginning"], max_characters=60, seed=3).texts

    ours = text()
    with plain_torch():
        assert text() == ours
