"""Retrieval, whitening, probes and correlations on vectors whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hldm.jepa.meaning import frames, mcnemar, nearest_neighbours, pair_features, probe, retrieve, spearman


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_each_query_finds_itself_and_a_shifted_list_finds_nothing():
    same = torch.eye(10)
    assert retrieve(same) == (1, 1, 1)
    found = retrieve(same.roll(1, dims=1) - same)  # the right one is last of all
    assert found.recall_1 == found.recall_5 == 0 and found.mrr == pytest.approx(1 / 10)


def test_ranks_are_counted_from_one():
    similarity = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]])  # ranks 1, 2, 3
    assert retrieve(similarity) == pytest.approx((1 / 3, 1, (1 + 1 / 2 + 1 / 3) / 3))


def test_vectors_that_are_all_the_same_are_worth_chance():
    found = retrieve(torch.ones(101, 101))
    assert found.recall_1 == found.recall_5 == 0 and found.mrr == pytest.approx(1 / 51)


def test_whitening_finds_what_a_common_direction_hides():
    content, noise = normal(200, 16), 50 * normal(400, 1, seed=1) @ normal(1, 16, seed=2)
    a, b = content + noise[:200], content + noise[200:]
    frame = frames(torch.cat([a, b]))
    raw, whitened = (retrieve(frame[name](a) @ frame[name](b).T).recall_1 for name in ("raw", "whitened"))
    assert raw < 0.4 and whitened > 0.9


def test_centring_takes_away_what_all_share():
    content = normal(200, 8)
    a, b = content + 100, content + 100 + 0.1 * normal(200, 8, seed=1)
    frame = frames(a)
    unit = frame["centred"](a)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(200, dtype=torch.float64))
    assert abs(float((frame["centred"](a) @ frame["centred"](b).T).mean())) < 0.05
    assert float((frame["raw"](a) @ frame["raw"](b).T).mean()) > 0.99


def test_whitened_vectors_have_unit_covariance():
    sample = normal(500, 6) @ normal(6, 6, seed=1) + 3
    frame = frames(sample)["whitened"]
    white = (sample - frame.mean) @ frame.turn
    torch.testing.assert_close(torch.cov(white.T), torch.eye(6, dtype=torch.float64), atol=1e-3, rtol=0)


def test_ranks_correlate_whatever_their_scale_and_with_ties():
    a = np.array([1.0, 2, 3, 4])
    assert spearman(a, np.exp(a)) == pytest.approx(1) and spearman(a, -(a**3)) == pytest.approx(-1)
    assert spearman(np.array([1, 1, 2, 3]), np.array([5, 5, 6, 9])) == pytest.approx(1)
    # by hand: ranks 1.5, 1.5, 3 and 1, 2, 3
    assert spearman(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert math.isnan(spearman(np.ones(4), a))


def test_a_probe_reads_what_is_there_and_nothing_else():
    x = normal(600, 5)
    label = (x[:, 2] > 0).long()
    assert probe(x[:400], label[:400], x[400:], label[400:]) > 0.95
    other = (normal(600, 1, seed=9)[:, 0] > 0).long()
    assert 0.35 < probe(x[:400], other[:400], x[400:], other[400:]) < 0.65


def test_features_of_a_pair_tell_equal_from_unequal():
    u, v = normal(300, 4), normal(300, 4, seed=1)
    same = torch.arange(300) % 2 == 0
    features = pair_features(u, torch.where(same[:, None], u, v))
    assert features.shape == (300, 16)
    assert probe(features[:200], same[:200].long(), features[200:], same[200:].long()) > 0.9


def test_neighbours_vote_and_the_nearer_wins_a_tie():
    train = torch.eye(4, dtype=torch.float64)
    test = torch.tensor([[0.1, 0.9, 0.0, 0.2], [0.8, 0.3, 0.2, 0.1]], dtype=torch.float64)
    label = torch.tensor([0, 1, 1, 0])
    assert nearest_neighbours(train, label, test, torch.tensor([1, 0])) == 1  # all four vote, two a label
    assert nearest_neighbours(train, label, test, torch.tensor([0, 0])) == 0.5
    many = torch.tensor([0, 1, 1, 1])
    assert (
        nearest_neighbours(train, many, test, torch.tensor([0, 0])) == 0
    )  # three outvote one that is nearer


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"), [(0, 0, 1), (5, 5, 1), (0, 5, 2 / 32), (1, 5, 14 / 64), (400, 0, 0)]
)
def test_mcnemars_exact_test_of_known_splits(only_first, only_second, p):
    first = [True] * only_first + [False] * only_second + [True, False] * 7
    second = [False] * only_first + [True] * only_second + [True, False] * 7
    assert mcnemar(first, second) == (only_first, only_second, pytest.approx(p, abs=1e-9))
    assert mcnemar(second, first)[2] == mcnemar(first, second)[2]
    with pytest.raises(ValueError):
        mcnemar([True], [])
