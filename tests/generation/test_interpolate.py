"""Paths of latents begin and end where they should, and the arc has equal steps."""

from __future__ import annotations

import pytest
import torch
from tiny_model import tiny_pipeline

from hldm.generation.interpolate import blend, latent_path


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(trunk_layers=1)


@pytest.mark.parametrize("path", ["linear", "spherical"])
def test_ends_are_the_latents_themselves_and_lengths_go_over_in_proportion(path):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (4, 9))
    torch.testing.assert_close(latent_path(a, b, 0.0, path), a, rtol=0, atol=0)
    torch.testing.assert_close(latent_path(a, b, 1.0, path), b, rtol=0, atol=0)
    assert [len(latent_path(a, b, w, path)) for w in (0.2, 0.4, 0.6, 0.8)] == [5, 6, 7, 8]
    torch.testing.assert_close(latent_path(a, a, 0.3, path), a)  # nowhere to go


def test_the_arc_keeps_its_angle_and_length_and_the_line_does_not():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    for weight in (0.25, 0.5, 0.75):
        arc = blend(a, b, weight, "spherical")
        assert float(arc.norm()) == pytest.approx(3 - 2 * weight, rel=1e-5)
        assert float(torch.atan2(arc[1], arc[0])) == pytest.approx(weight * torch.pi / 2, rel=1e-5)
        torch.testing.assert_close(blend(a, b, weight, "linear"), (1 - weight) * a + weight * b)
    for other in (2 * a, -a, torch.zeros(2)):  # no arc, or many: the line
        torch.testing.assert_close(blend(a, other, 0.5, "spherical"), (a + other) / 2)


def test_nothing_is_drawn_and_every_step_has_its_chunks(pipe):
    found = pipe.interpolate("And the king said", "Go up to the town and take it", steps=3)
    assert found == pipe.interpolate("And the king said", "Go up to the town and take it", steps=3)
    assert [step.weight for step in found] == [0.0, 0.5, 1.0]
    back = pipe.interpolate("Go up to the town and take it", "And the king said", steps=3)
    if all(len(step.chunks) > 2 for step in found + back):
        assert [step.text for step in found] == [step.text for step in back[::-1]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(steps=1), "steps must lie in 2..101"),
        (dict(steps=10_000), "steps must lie in 2..101"),
        (dict(path="circular"), "path must be one of linear, spherical"),
    ],
)
def test_what_cannot_be_is_refused(options, says, pipe):
    with pytest.raises(ValueError, match=says):
        pipe.interpolate("one", "two", **options)
    with pytest.raises(ValueError, match=r"texts\[1\] is empty"):
        pipe.interpolate("one", "")
    with pytest.raises(ValueError, match="twin"):
        tiny_pipeline(0, latent_dim=0, carry_state=True).interpolate("one", "two")
