"""`select`: which states are kept, what the reader of them sees, and how it teaches the score."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hldm.chunking.select import FRESH_BYTES, QUERIES, Attention, QuerySegmenter, SelectSegmenter, hold
from tests.chunking.test_segmenter import random_text, small_segmenter


def select(**settings) -> SelectSegmenter:
    segmenter = small_segmenter("select", **settings)
    assert isinstance(segmenter, SelectSegmenter)
    return segmenter


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_starts(b: int, t: int, seed: int) -> Tensor:
    return torch.rand(b, t, generator=torch.Generator().manual_seed(seed)) < 0.2


@pytest.mark.parametrize(("t", "target", "k"), [(20, 5.0, 4), (33, 5.0, 7), (3, 7.0, 1), (31, 6.0, 5)])
def test_the_k_best_of_each_window_are_kept(t, target, k):
    segmenter = select(target_bytes=target)
    scores = normal(4, t)
    kept = segmenter.best(scores)
    assert ((kept > 0).sum(dim=1) == k).all()
    torch.testing.assert_close(kept, (kept > 0).double())
    for row in range(4):
        assert scores[row][kept[row] > 0].min() > scores[row][kept[row] == 0].max()


def test_equal_scores_keep_no_more_states():
    segmenter = select()
    places = torch.arange(20)
    # all alike, as nothing is learnt yet; six the best; one, and the others alike; eight the best
    for scores in (0 * places, places % 3, places.clamp(min=18), places.clamp(max=12)):
        kept = segmenter.best(scores.expand(2, 20).double())[1]
        assert (kept > 0).sum() == 4
        assert scores[kept > 0].min() >= scores[kept == 0].max()


def test_what_is_kept_has_the_gradient_of_a_sigmoid_about_the_least_kept():
    segmenter = select()
    scores = normal(3, 20).requires_grad_()
    weight = normal(3, 20, seed=1)
    (gradient,) = torch.autograd.grad((weight * segmenter.best(scores)).sum(), scores)
    least = scores.detach().sort(dim=1, descending=True).values[:, 3:4]
    p = (scores.detach() - least).sigmoid()
    torch.testing.assert_close(gradient, weight * p * (1 - p))


@pytest.mark.parametrize("seed", range(5))
def test_what_was_kept_last_is_held(seed):
    kept, start = normal(2, 25, 3, seed=seed), random_starts(2, 25, seed)
    expected = torch.zeros_like(kept)
    for row in range(2):
        last = torch.zeros(3, dtype=torch.float64)
        for t in range(25):
            last = kept[row, t] if start[row, t] else last
            expected[row, t] = last
    assert hold(kept, start).equal(expected)


def test_the_reader_foresees_a_byte_from_what_is_kept_and_the_freshest_two(monkeypatch):
    segmenter = select()
    text, doc_start = random_text(2, 30)
    state = segmenter.initial_state(2)
    features, _ = segmenter.read(text, doc_start, state)
    scores = segmenter.score(features.before)[..., 0]
    start = segmenter.best(scores) > 0
    read, foresee = [], segmenter.reader.forward
    monkeypatch.setattr(segmenter.reader, "forward", lambda x: read.append(x) or foresee(x))
    loss, _ = segmenter.loss(text, doc_start, state, 0.5, torch.Generator())

    one, two = segmenter.fresh
    assert FRESH_BYTES == 2
    for row in range(2):
        kept = features.before[row]
        held = torch.zeros(16, dtype=torch.float64)
        for t in range(30):
            held = kept[t] if start[row, t] else held
            last, before = (text[row, t - back] if t >= back else torch.tensor(256) for back in (1, 2))
            recent = one.weight[last] + two.weight[before]
            torch.testing.assert_close(read[0][row, t], torch.cat([held, recent]))
    p = foresee(read[0]).softmax(dim=-1).gather(2, text[..., None])
    torch.testing.assert_close(loss, -p.log().mean() + segmenter.next_byte_nats(features, text).mean())


def test_the_reader_teaches_the_score(monkeypatch):
    segmenter = select()
    monkeypatch.setattr(segmenter, "next_byte_nats", lambda *_: torch.zeros(()))
    loss, _ = segmenter.loss(*random_text(2, 30), segmenter.initial_state(2), 0.5, torch.Generator())
    assert torch.autograd.grad(loss, segmenter.score[2].weight)[0].abs().max() > 1e-6


def test_a_chunk_starts_at_the_score_of_the_state_before_it():
    segmenter = select()
    text, doc_start = random_text(2, 20)
    features, _ = segmenter.read(text, doc_start, segmenter.initial_state(2))
    first, state = segmenter.signal(text[:, :7], doc_start[:, :7], segmenter.initial_state(2))
    rest, _ = segmenter.signal(text[:, 7:], doc_start[:, 7:], state)
    signal = torch.cat([first, rest], dim=1)
    assert segmenter.rule == "level"
    torch.testing.assert_close(signal[:, 1:], segmenter.score(features.after[:, :-1]))


def test_queries_keep_what_each_attends_to_most_and_count_it_once():
    segmenter = small_segmenter("queries", target_bytes=5.0)
    assert isinstance(segmenter, QuerySegmenter) and isinstance(segmenter.score, Attention)
    size = 5 * QUERIES
    before = normal(
        2, size + 7, segmenter.embed.embedding_dim
    )  # a whole stretch and the beginning of another
    kept = segmenter.keep(before)
    attention = segmenter.score.each(before)
    for row in range(2):
        first = attention[row, :size].argmax(dim=0)
        second = size + attention[row, size:].argmax(dim=0)
        expected = torch.zeros(size + 7, dtype=torch.float64)
        expected[torch.cat([first, second])] = 1
        torch.testing.assert_close(kept[row], expected)


def test_every_query_is_taught():
    segmenter = small_segmenter("queries", target_bytes=5.0)
    assert isinstance(segmenter, QuerySegmenter) and isinstance(segmenter.score, Attention)
    kept = segmenter.keep(normal(2, 5 * QUERIES, segmenter.embed.embedding_dim))
    (kept * normal(*kept.shape, seed=1)).sum().backward()
    assert (segmenter.score.queries.grad.abs().sum(dim=1) > 0).all()
