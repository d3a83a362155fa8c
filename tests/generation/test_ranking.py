"""Rules on stubs whose best is known; and none of them cares in which order the stubs stand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hldm.generation.chunk import Piece
from hldm.generation.ranking import RULES, Stub, by_agreement, by_bound, by_moments, by_risk, has_left

TEXTS = [b"the king went", b"the king sent", b"the kings went", b"zzz qqq xxx!", b"the ring went"]


def stubs_of(texts):
    found = []
    for text in texts:
        torch.manual_seed(len(text) + text[0] + text[-1] + text.count(b"i"))
        stub = Stub(b"before ", [Piece(text[:5], False), Piece(text[5:], False)], lift=float(sum(text)))
        stub.residuals, stub.bits = [*torch.randn(2, 3)], torch.rand(2).tolist()
        found.append(stub)
    return found


@pytest.mark.parametrize("name", RULES)
def test_scores_go_with_the_stubs_in_whatever_order_they_stand(name):
    rank, order = RULES[name].rank, [3, 0, 4, 1, 2]
    stubs = stubs_of(TEXTS)
    scores = rank(stubs)
    assert np.allclose(rank([stubs[i] for i in order]), [scores[i] for i in order])
    assert len({round(score, 9) for score in scores}) > 1


def test_least_risk_and_agreement_like_what_most_say_and_not_the_odd_one_out():
    stubs = stubs_of(TEXTS)
    for rule in (by_risk, by_agreement):
        scores = rule(stubs)
        assert np.argmin(scores) == 3 and np.argmax(scores) == 0


def test_risk_is_chrf():
    """F_2 of character n-grams: of "abc" as a hypothesis for "abd" 2/3, 1/2 and 0 for n = 1, 2, 3."""
    scores = by_risk(stubs_of([b"abcabc"[:3] + b"", b"abd"]))
    assert scores == pytest.approx([(2 / 3 + 1 / 2 + 0) / 3] * 2)
    long, short = by_risk(stubs_of([b"ab cd", b"a b"]))  # spaces do not count; recall counts for more
    assert long > short


def test_agreement_charges_for_saying_one_thing_again_and_again():
    varied, again = by_agreement(stubs_of([b"abcd", b"aaaa", b"abcd", b"aabc"]))[:2]
    assert varied > again


def test_the_bound_is_by_byte():
    short, long = Stub(b"", [Piece(b"ab", False)], bits=[3.0]), Stub(b"", [Piece(b"abcd", False)], bits=[4.0])
    assert by_bound([short, long]) == [-1.5, -1.0]


def test_moments_are_those_of_a_normal_where_the_prediction_holds():
    torch.manual_seed(0)
    drawn = [Stub(b"", residuals=[*torch.randn(40, 4)]) for _ in range(400)]
    scores = torch.tensor(by_moments(drawn))
    assert scores.mean() == pytest.approx(-8, abs=0.6)  # two squares of standard normals a dimension
    assert sum(map(has_left, drawn)) <= 4
    for residuals in (torch.randn(40, 4) + 1.5, 3 * torch.randn(40, 4), torch.zeros(40, 4)):
        stub = Stub(b"", residuals=[*residuals])
        assert has_left(stub) and by_moments([stub])[0] < scores.min()


def test_a_stub_alone_has_nobody_to_agree_with():
    [alone] = stubs_of(TEXTS[:1])
    assert by_risk([alone]) == [0] and not math.isnan(by_agreement([alone])[0])
