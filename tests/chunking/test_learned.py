"""`learned`: where a state turns, by hand; how many starts its loss asks for; what teaches its router."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hldm.chunking import learned as learned_segmenter
from hldm.chunking.learned import CURRICULUM, RATIO_WEIGHT, SHARPNESS, LearnedSegmenter
from tests.chunking.test_segmenter import random_text, small_segmenter

LEAST = 1e-4  # to which p is held


def learned() -> LearnedSegmenter:
    segmenter = small_segmenter("learned")
    assert isinstance(segmenter, LearnedSegmenter)
    return segmenter


def probability(segmenter: LearnedSegmenter, text: Tensor, doc_start: Tensor) -> tuple[Tensor, Tensor]:
    """p (b t) from the signal, in two stretches, and the trunk's states after each byte (b t d)."""
    state = segmenter.initial_state(len(text))
    features, _ = segmenter.read(text, doc_start, state)
    first, state = segmenter.signal(text[:, :7], doc_start[:, :7], state)
    rest, _ = segmenter.signal(text[:, 7:], doc_start[:, 7:], state)
    return torch.cat([first, rest], dim=1)[..., 0], features.after


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_chunk_starts_where_the_state_before_it_has_turned(is_trained):
    segmenter = learned()
    query = key = torch.eye(16, dtype=torch.float64)  # as they start
    if is_trained:
        for linear in (segmenter.query, segmenter.key):
            torch.nn.init.normal_(linear.weight)
        query, key = segmenter.query.weight, segmenter.key.weight
    text, doc_start = random_text(2, 20)
    p, after = probability(segmenter, text, doc_start)
    assert segmenter.rule == "level"
    for row, t in ((0, 2), (0, 7), (1, 8), (1, 19)):
        now, earlier = (x + segmenter.turn(x) for x in (after[row, t - 1], after[row, t - 2]))
        q, k = query @ now, key @ earlier
        expected = (1 - (q @ k) / (q.norm() * k.norm())) / 2
        assert LEAST < expected < 1 - LEAST
        torch.testing.assert_close(p[row, t], expected)


def test_a_state_that_stays_starts_nothing_and_one_that_turns_round_everything():
    segmenter = learned()
    torch.nn.init.zeros_(segmenter.turn[2].weight)
    torch.nn.init.zeros_(segmenter.turn[2].bias)
    text, doc_start = random_text(1, 6)
    features, _ = segmenter.read(text, doc_start, segmenter.initial_state(1))
    one = features.after[0, 0]
    before = torch.stack([one, one, 2 * one, -one, -one, one])[None]
    p, carry = segmenter.probability(features._replace(before=before), segmenter.initial_state(1))
    sides = [0.5, LEAST, LEAST, 1 - LEAST, LEAST, 1 - LEAST]  # nothing was before the first
    torch.testing.assert_close(p, torch.tensor([sides], dtype=torch.float64))
    torch.testing.assert_close(carry, one[None])


def with_router(p: Tensor, monkeypatch: pytest.MonkeyPatch) -> LearnedSegmenter:
    """One whose router says p (b t), and to which no byte costs anything."""
    segmenter = learned()
    monkeypatch.setattr(segmenter, "probability", lambda features, state: (p, features.after[:, -1]))
    monkeypatch.setattr(segmenter, "next_byte_nats", lambda *_: torch.zeros_like(p))
    monkeypatch.setattr(segmenter.writer, "forward", lambda text, start: torch.zeros_like(p))
    return segmenter


def loss_of(segmenter: LearnedSegmenter, b: int, t: int, progress: float = 1.0) -> Tensor:
    text, doc_start = random_text(b, t)
    generator = torch.Generator().manual_seed(0)
    return segmenter.loss(text, doc_start, segmenter.initial_state(b), progress, generator)[0]


def router(share: float, mean: float) -> Tensor:
    """p (1 1000), of which `share` is above a half and whose mean is `mean`."""
    starts = round(1000 * share)
    low = torch.linspace(0.001, 0.1, 1000 - starts, dtype=torch.float64)
    high = torch.full((starts,), (1000 * mean - low.sum()) / starts, dtype=torch.float64)
    assert 0.5 < high[0] < 1
    return torch.cat([low, high])[None].requires_grad_()


def test_the_ratio_loss_is_h_nets(monkeypatch):
    monkeypatch.setattr(learned_segmenter, "NOISE", 0.0)  # a start is then where p is above a half
    for share, mean in ((0.2, 0.2), (0.3, 0.2), (0.3, 0.25), (0.1, 0.12)):
        p = router(share, mean)
        loss = loss_of(with_router(p, monkeypatch), 1, 1000)
        # equation 10, N = 5
        expected = 5 / 4 * (4 * share * mean + (1 - share) * (1 - mean))
        torch.testing.assert_close(loss / RATIO_WEIGHT, torch.tensor(expected, dtype=torch.float64))
        # more starts than wanted lower p, fewer raise it: the share itself is no function of p
        (gradient,) = torch.autograd.grad(loss, p)
        slope = RATIO_WEIGHT * 5 / 4 * (5 * share - 1) / 1000
        torch.testing.assert_close(gradient, torch.full_like(p, slope))


@pytest.mark.parametrize(
    ("progress", "times"), [(0, 1.5), (CURRICULUM / 2, 1.25), (CURRICULUM, 1), (0.9, 1), (1, 1)]
)
def test_chunks_are_wanted_longer_at_first(progress, times, monkeypatch):
    monkeypatch.setattr(learned_segmenter, "NOISE", 0.0)
    share = 1 / (5 * times)
    p = router(round(share, 3), mean=share)
    loss = loss_of(with_router(p, monkeypatch), 1, 1000, progress)
    torch.testing.assert_close(loss / RATIO_WEIGHT, torch.ones_like(loss), rtol=0, atol=1e-3)
    assert torch.autograd.grad(loss, p)[0].abs().max() < 1e-5


def test_starts_are_the_routers_with_noise_that_halves(monkeypatch):
    p = torch.full((2, 50), 0.3, dtype=torch.float64)
    segmenter, told = with_router(p, monkeypatch), []
    monkeypatch.setattr(segmenter.writer, "forward", lambda text, start: told.append(start) or start)
    for progress in (0.0, 1.0):
        loss_of(segmenter, 2, 50, progress)
    first, last = (start.logit() - SHARPNESS * p.logit() for start in told)
    torch.testing.assert_close(last, first / 2)
    assert first.std() > 1 and first.mean().abs() < 0.5


def test_the_decoders_bits_alone_teach_the_router(monkeypatch):
    segmenter, nats = learned(), []
    write = segmenter.writer.forward
    monkeypatch.setattr(segmenter.writer, "forward", lambda *given: nats.append(write(*given)) or nats[0])
    monkeypatch.setattr(segmenter, "next_byte_nats", lambda *_: torch.zeros(()))
    monkeypatch.setattr(learned_segmenter, "RATIO_WEIGHT", 0.0)
    loss = loss_of(segmenter, 2, 40, progress=0.5)
    torch.testing.assert_close(loss, nats[0][:, 1:].mean())  # before a window's first byte there is no choice
    gradients = torch.autograd.grad(loss, [segmenter.query.weight, segmenter.key.weight])
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients)
