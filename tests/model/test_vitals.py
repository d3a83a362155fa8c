"""What dies in silence is told from what lives, by figures that are known."""

from __future__ import annotations

import math

import pytest
import torch

from hldm.config import DiffusionConfig
from hldm.model.diffusion import BINS, Schedule
from hldm.model.mixture import LOGIT_CAP, MixturePredictor
from hldm.model.vitals import (
    complaints,
    effective_rank,
    signs_of_latents,
    signs_of_schedule,
    signs_of_weights,
)


def test_rank_counts_directions():
    torch.manual_seed(0)
    noise = torch.randn(20_000, 6)
    assert effective_rank(noise) == pytest.approx(6, rel=1e-2)
    assert effective_rank(noise[:, :1] * torch.randn(6)) == pytest.approx(1, abs=1e-6)
    turned = torch.linalg.qr(torch.randn(6, 6))[0]
    flat = torch.cat([noise[:, :3], torch.zeros(20_000, 3)], dim=1) @ turned
    assert effective_rank(flat) == pytest.approx(3, rel=1e-2)


def test_weights_and_what_is_in_use_are_two_things():
    """Sure of one prototype each time, and all of them in turn: no entropy, everything in use."""
    turns = torch.eye(8).repeat(8, 1).clamp(min=1e-30).log()
    assert signs_of_weights(turns) == pytest.approx({"weights_bits": 0, "prototypes": 8}, abs=1e-4)
    even = torch.full((64, 8), -math.log(8))
    assert signs_of_weights(even) == pytest.approx({"weights_bits": 3, "prototypes": 8}, rel=1e-5)
    dead = turns[:1].repeat(64, 1)
    assert signs_of_weights(dead) == pytest.approx({"weights_bits": 0, "prototypes": 1}, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "signs"),
    [
        ("prototypes", signs_of_weights(torch.eye(8)[:1].repeat(64, 1).clamp(min=1e-30).log())),
        ("dead_dimensions", signs_of_latents(1e-3 * torch.randn(64, 4))),
        ("dead_dimensions", signs_of_latents(torch.randn(64, 4) * torch.tensor([1.0, 1.0, 1.0, 0.01]))),
        ("rank", signs_of_latents(torch.randn(64, 1) * torch.ones(4))),
        ("largest_bin", {"largest_bin": 0.9}),
    ],
)
def test_each_death_has_its_line(name, signs):
    assert [*complaints(signs)] == [name]


def test_what_lives_is_left_in_peace():
    torch.manual_seed(0)
    signs = signs_of_latents(torch.randn(64, 4)) | signs_of_weights(torch.randn(64, 9).log_softmax(dim=1))
    signs |= signs_of_schedule(Schedule(DiffusionConfig()))
    assert signs["largest_bin"] == pytest.approx(1 / BINS) and complaints(signs) == {}
    assert complaints({}) == complaints(signs_of_latents(torch.zeros(5, 4))) == {}  # too few to say
    assert complaints(signs_of_latents(torch.randn(64, 1))) == {}  # one number has one direction


def test_numbers_that_ran_away_are_no_sign():
    """The last batch of a training may be one whose step was skipped."""
    broken = torch.randn(64, 4).index_fill(0, torch.tensor([3]), float("nan"))
    assert signs_of_latents(broken) == {} and complaints(signs_of_weights(broken.log_softmax(dim=1))) == {}


def test_a_schedule_that_is_stuck_is_seen():
    schedule = Schedule(DiffusionConfig())
    gamma = torch.full((4096,), 0.5)
    for _ in range(400):
        schedule.observe(gamma, torch.full_like(gamma, 9.0))
        schedule.observe(torch.linspace(-2, 4.9, 4096), torch.full_like(gamma, 1e-6))
        schedule.update()
    assert "largest_bin" in complaints(signs_of_schedule(schedule))


@pytest.mark.parametrize("latent_dim", [4, 8, 16])
def test_the_cap_keeps_a_mixture_alive(latent_dim):
    """Latents that say nothing at first, and steps too large: what killed mixtures off the shipped shape."""
    torch.manual_seed(0)
    found = {}
    for cap in (0.0, LOGIT_CAP):
        mixture = MixturePredictor(16, latent_dim, 64, cap)
        optimizer = torch.optim.SGD(mixture.weigh.parameters(), lr=1e3)
        centres = torch.randn(8, latent_dim)
        for step in range(150):
            kind = torch.randint(8, (256,))
            feature = torch.nn.functional.one_hot(kind, 16).float()
            # first one wide cloud around 0, whatever the text; then each kind of text at its own place
            mu = torch.randn(256, latent_dim) if step < 50 else centres[kind]
            weights = mixture.log_weights(feature)
            loss = mixture.rate(mu, torch.randn_like(mu), -2.2, weights).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[cap] = signs_of_weights(mixture.log_weights(feature).detach())["prototypes"]
    assert found[LOGIT_CAP] > 2 * found[0.0] and found[LOGIT_CAP] > 3
