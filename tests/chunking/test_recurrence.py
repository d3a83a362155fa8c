"""`state_change` and `gate` read the recurrence that Griffin computes with, up to the byte before, and teach it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hldm.chunking.recurrence import (
    TEACHING_WEIGHT,
    ForgettingSegmenter,
    GateSegmenter,
    Recurrence,
    StateSegmenter,
    watched,
)
from hldm.model.griffin import DECAY_POWER, RGLRU
from tests.chunking.test_segmenter import random_text, small_segmenter

TAUGHT = 4  # channels, of a width of 16
every_strategy = pytest.mark.parametrize("strategy", ["state_change", "gate"])


def forgetting(strategy: str, layers: int = 3) -> ForgettingSegmenter:
    """A small segmenter, no bias of whose gates is zero."""
    segmenter = small_segmenter(strategy, layers=layers)
    assert isinstance(segmenter, ForgettingSegmenter)
    for part in segmenter.modules():
        if isinstance(part, RGLRU):
            torch.nn.init.normal_(part.gate_bias)
    return segmenter


def random_unit(width: int = 12, heads: int = 3) -> tuple[RGLRU, Tensor]:
    torch.manual_seed(0)
    unit = RGLRU(width, heads).double()
    torch.nn.init.normal_(unit.gate_bias)
    return unit, torch.randn(2, 9, width, dtype=torch.float64)


def test_the_gate_that_is_watched_is_the_recurrence_gate_of_griffin():
    """Griffin, equations 1 to 4, head by head: r_t, and not i_t."""
    unit, x = random_unit()
    with watched(unit) as found:
        unit(x, torch.zeros(2, 12, dtype=torch.float64), torch.zeros(2, 9, dtype=torch.float64))
    (recurrence,) = found
    input_gate, gate = torch.zeros_like(x), torch.zeros_like(x)
    for head in range(3):
        at = slice(4 * head, 4 * head + 4)
        w_i, w_r = unit.gate_weight[head].chunk(2, dim=-1)
        b_i, b_r = unit.gate_bias[:, head]
        input_gate[..., at] = (x[..., at] @ w_i + b_i).sigmoid()
        gate[..., at] = (x[..., at] @ w_r + b_r).sigmoid()
    torch.testing.assert_close(recurrence.gates, gate)
    # that it is r, whatever its weights are called: with it, and no other, the states are what the unit computed
    a = (-DECAY_POWER * F.softplus(unit.a_param) * recurrence.gates).exp()
    h, states = torch.zeros(2, 12, dtype=torch.float64), []
    for t in range(9):
        h = a[:, t] * h + (1 - a[:, t] ** 2).sqrt() * input_gate[:, t] * x[:, t]
        states.append(h)
    torch.testing.assert_close(recurrence.states, torch.stack(states, dim=1))


def test_blocks_are_watched_first_to_last_and_only_within_the_context():
    segmenter = small_segmenter("gate")
    text, doc_start = random_text(1, 6)
    blocks = torch.nn.ModuleList([segmenter.trunk, small_segmenter("gate", seed=1).trunk])
    with watched(blocks) as found:
        x, state = segmenter.embed(text), segmenter.initial_state(1).griffin
        last = [trunk(x, state, doc_start, doc_start)[1][-1].hidden for trunk in blocks]
    assert [part.states.shape for part in found] == [(1, 6, 16)] * 2
    for part, hidden in zip(found, last, strict=True):
        torch.testing.assert_close(part.states[:, -1], hidden)
    segmenter.read(text, doc_start, segmenter.initial_state(1))
    assert len(found) == 2


def whole_signal(segmenter: ForgettingSegmenter, text: Tensor, doc_start: Tensor, cut: int = 7) -> Tensor:
    """(b t k), read in two stretches."""
    first, state = segmenter.signal(text[:, :cut], doc_start[:, :cut], segmenter.initial_state(len(text)))
    rest, _ = segmenter.signal(text[:, cut:], doc_start[:, cut:], state)
    return torch.cat([first, rest], dim=1)


def test_the_state_at_a_byte_is_that_after_the_byte_before():
    segmenter = forgetting("state_change")
    assert isinstance(segmenter, StateSegmenter)
    text, doc_start = random_text(2, 16)
    doc_start[1, 10] = True
    signal = whole_signal(segmenter, text, doc_start)
    assert signal.shape == (2, 16, TAUGHT) and segmenter.rule == "movement"
    assert not signal[:, 0].any() and not signal[1, 10].any()
    for row, opens, at in ((0, 0, 1), (0, 0, 7), (0, 0, 15), (1, 0, 9), (1, 10, 11), (1, 10, 15)):
        _, state = segmenter.read(
            text[row : row + 1, opens:at],
            torch.arange(at - opens)[None] == 0,
            segmenter.initial_state(1),
        )
        torch.testing.assert_close(signal[row, at], state.griffin[-1].hidden[0, :TAUGHT])


def test_the_gates_at_a_byte_are_by_how_much_less_the_byte_before_kept():
    segmenter = forgetting("gate")
    assert isinstance(segmenter, GateSegmenter)
    text, doc_start = random_text(2, 16)
    signal = whole_signal(segmenter, text, doc_start)
    assert signal.shape == (2, 16, 1) and segmenter.rule == "level"
    with watched(segmenter.trunk) as found:
        segmenter.read(text, doc_start, segmenter.initial_state(2))
    kept = 1 - found[0].gates[..., :TAUGHT].mean(dim=-1)
    torch.testing.assert_close(signal[:, 2:, 0], kept[:, :-2] - kept[:, 1:-1])


@every_strategy
@pytest.mark.parametrize("at", [1, 6, 7, 12])
def test_a_byte_changes_the_signal_from_the_next_byte_on(strategy, at):
    segmenter = forgetting(strategy)
    text, doc_start = random_text(1, 24)
    other = text.clone()
    other[0, at] = (text[0, at] + 1) % 256
    one, two = (whole_signal(segmenter, ids, doc_start)[0] for ids in (text, other))
    torch.testing.assert_close(one[: at + 1], two[: at + 1], rtol=0, atol=0)
    assert (one[at + 1] != two[at + 1]).all()
    # gates of the first block see four bytes, and the signal compares two of them
    assert (one[at + 6 :] != two[at + 6 :]).any() == (strategy != "gate")


def taught(
    segmenter: ForgettingSegmenter, gates: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """The loss on random text with these gates (b t d), and the entropy of every byte (b t)."""
    text, doc_start = random_text(*gates.shape[:2])
    state = segmenter.initial_state(len(gates))
    features, after = segmenter.read(text, doc_start, state)
    monkeypatch.setattr(
        segmenter, "recurrence", lambda *_: (features, Recurrence(torch.zeros_like(gates), gates), after)
    )
    loss, _ = segmenter.loss(text, doc_start, state, 0.5, torch.Generator())
    p = segmenter.outputs(features.before).softmax(dim=-1)
    return loss - segmenter.next_byte_nats(features, text).mean(), -(p * p.log()).sum(dim=-1)


@every_strategy
def test_gates_are_taught_to_open_before_entropy_rises_most_as_often_as_chunks_are_wanted(
    strategy, monkeypatch
):
    gates = torch.full((4, 50, TAUGHT), 0.5, dtype=torch.float64, requires_grad=True)
    loss, entropy = taught(forgetting(strategy), gates, monkeypatch)
    assert loss.item() == pytest.approx(TEACHING_WEIGHT * math.log(2))
    (gradient,) = torch.autograd.grad(loss, gates)
    assert not gradient[:, -1].any()  # what comes after the last byte is not known
    opens = gradient[:, :-1] < 0
    assert (opens == opens[..., :1]).all() and (gradient[:, :-1] != 0).all()
    opens, rise = opens[..., 0], entropy[:, 1:] - entropy[:, :-1]
    assert opens.sum() == pytest.approx(4 * 49 / 5, abs=1)  # target_bytes
    assert rise[opens].min() > rise[~opens].max()


def test_gates_learn_to_open_at_the_ends_of_words():
    """Within a word every letter follows from the one before; which word comes next does not."""
    segmenter = forgetting("gate", layers=1).float()  # as `state_change` learns, too
    words = torch.tensor([list(word) for word in (b"abcde", b"fghij", b"klmno", b"pqrst")])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(segmenter.parameters(), lr=2e-2)

    def random_words() -> tuple[Tensor, Tensor]:
        text = words[torch.randint(4, (8, 10), generator=generator)].flatten(1)
        return text, torch.arange(50).expand(8, 50) == 0

    for _ in range(60):
        text, doc_start = random_words()
        optimizer.zero_grad()
        segmenter.loss(text, doc_start, segmenter.initial_state(8), 0.5, generator)[0].backward()
        optimizer.step()
    text, doc_start = random_words()
    with torch.no_grad(), watched(segmenter.trunk) as found:
        segmenter.read(text, doc_start, segmenter.initial_state(8))
    at = found[-1].gates[..., :TAUGHT].mean(dim=(0, 2)).reshape(10, 5)[1:].mean(dim=0)  # by place in a word
    assert at[4] > 0.8 and at[:4].max() < 0.3
