"""Figures of collapse, on vectors that have collapsed in a known way, and the terms that work against it."""

from __future__ import annotations

import pytest
import torch

from hldm.jepa.collapse import complaints, sigreg, skill, spread, squared_covariances, variance_hinge


def normal(k: int, z: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(k, z, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_spread_out_vectors_have_full_rank_and_no_cosine():
    found = spread(normal(4000, 8))
    assert found["rank"] == pytest.approx(8, abs=0.05) and abs(found["mean_cosine"]) < 0.01
    assert found["least_deviation"] == pytest.approx(1, abs=0.05)


def test_a_line_has_rank_one_and_a_plane_two():
    basis = torch.linalg.qr(normal(8, 8))[0]
    for rank in (1, 2):
        assert spread(normal(1000, rank) @ basis[:rank])["rank"] == pytest.approx(rank, abs=0.02)


def test_one_point_has_no_deviation_and_a_cosine_of_one():
    found = spread(torch.ones(100, 8) + 1e-6 * normal(100, 8))
    assert found["least_deviation"] < 1e-5 and found["mean_cosine"] == pytest.approx(1)


def test_skill_of_perfect_of_mean_and_of_length_alone():
    target, kind = normal(600, 4), torch.arange(600) % 3
    target = target + 2 * torch.nn.functional.one_hot(kind, 4)
    perfect = skill(target, target, kind)
    assert perfect.r2 == perfect.r2_beyond_length == pytest.approx(1) and perfect.shuffle_gap > 0.5
    assert skill(target.mean(dim=0).expand_as(target), target, kind).r2 == pytest.approx(0)
    by_kind = torch.stack([target[kind == k].mean(dim=0) for k in range(3)])[kind]
    leak = skill(by_kind, target, kind)
    assert leak.r2 > 0.3 and leak.r2_beyond_length == pytest.approx(0, abs=1e-9)


def test_lengths_that_are_rare_explain_nothing():
    target = normal(100, 4)
    found = skill(target + 0.1 * normal(100, 4, seed=1), target, torch.arange(100))
    assert found.r2_beyond_length == pytest.approx(found.r2, abs=0.01) and found.r2 > 0.9


def test_a_rank_that_halves_is_said():
    assert complaints({"rank": 9.0, "untrained_rank": 20.0}).keys() == {"rank"}
    assert complaints({"rank": 11.0, "untrained_rank": 20.0, "r2_beyond_length": 0.4}) == {}
    assert complaints({"r2_beyond_length": 0.01}).keys() == {"r2_beyond_length"}
    assert complaints({}) == {}


def test_the_hinge_is_zero_for_unit_deviations_and_one_for_a_point():
    assert float(variance_hinge(2 * normal(500, 4))) == 0
    assert float(variance_hinge(torch.ones(500, 4))) == pytest.approx(0.99, abs=1e-3)  # sqrt of its epsilon


def test_covariances_are_those_of_different_dimensions():
    x = normal(5000, 3)
    tied = torch.stack([x[:, 0], x[:, 0], x[:, 1]], dim=1)
    assert float(squared_covariances(x)) < 0.01
    assert float(squared_covariances(tied)) == pytest.approx(2 / 3, rel=0.15)


def test_sigreg_tells_a_standard_normal_from_others():
    def value(vectors: torch.Tensor) -> float:
        return float(sigreg(vectors.float(), torch.Generator().manual_seed(1)))

    right = value(normal(512, 16))
    assert right < 1.5
    for wrong in (
        0.3 * normal(512, 16),
        torch.ones(512, 16),
        2 * normal(512, 16),
        normal(512, 16).sign() * 1.5,
    ):
        assert value(wrong) > 2 * right


@pytest.mark.parametrize("term", ["vicreg", "sigreg"])
def test_the_terms_spread_a_line_out(term):
    x = (normal(256, 1) @ normal(1, 8, seed=1) + 0.05 * normal(256, 8, seed=2)).float().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    before = spread(x.detach())["rank"]
    for index in range(60):
        if term == "vicreg":
            loss = variance_hinge(x) + squared_covariances(x)
        else:
            loss = sigreg(x, torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 1.5 and spread(x.detach())["rank"] > 6
