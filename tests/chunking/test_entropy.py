"""What each form of `entropy` calls a border, on predictions made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hldm.chunking.entropy import EntropySegmenter, entropy_signal, rule_of
from tests.chunking.test_segmenter import random_text, small_segmenter

FORMS = ("threshold", "rise", "budget")
# over four bytes: 2, 1.75, 0, 1 and 2 bits
P = [
    [0.25, 0.25, 0.25, 0.25],
    [0.5, 0.25, 0.125, 0.125],
    [1, 1e-300, 1e-300, 1e-300],
    [0.5, 1e-300, 0.5, 1e-300],
    [0.25, 0.25, 0.25, 0.25],
]
TEXT = [1, 3, 0, 2, 3]  # which cost 2, 3, 0, 1 and 2 bits


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("threshold", [2, 1.75, 0, 1, 2]),
        ("rise", [2 - 0.5, -0.25, -1.75, 1, 1]),  # the byte before the first had half a bit
        ("budget", [10, 12, 15, 15, 16]),  # 10 bits were spent before; a byte's own are not in its signal
    ],
)
def test_a_signal_is_in_bits(form, expected):
    log_p = torch.tensor([P], dtype=torch.float64).log()
    carry = torch.tensor([[10, 0.5]], dtype=torch.float64)  # bits spent, and the last entropy
    signal, carry = entropy_signal(log_p, torch.tensor([TEXT]), form, carry)
    torch.testing.assert_close(signal, torch.tensor(expected, dtype=torch.float64)[None, :, None])
    torch.testing.assert_close(carry, torch.tensor([[18, 2]], dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
def test_a_signal_in_two_pieces_equals_one(form):
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(3, 12, 7, dtype=torch.float64, generator=generator).log_softmax(dim=-1)
    text = torch.randint(7, (3, 12), generator=generator)
    carry = torch.rand(3, 2, dtype=torch.float64, generator=generator)
    whole, last = entropy_signal(log_p, text, form, carry)
    first, between = entropy_signal(log_p[:, :5], text[:, :5], form, carry)
    rest, end = entropy_signal(log_p[:, 5:], text[:, 5:], form, between)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    torch.testing.assert_close(end, last)


def test_a_budget_is_what_a_chunk_may_spend_and_the_others_are_levels():
    for form, rule in (("threshold", "level"), ("rise", "level"), ("budget", "movement")):
        assert rule_of(form) == small_segmenter("entropy", entropy_form=form).rule == rule


@pytest.mark.parametrize("form", FORMS)
def test_a_segmenters_signal_is_that_of_its_own_next_byte(form):
    segmenter = small_segmenter("entropy", entropy_form=form)
    text, doc_start = random_text(2, 20)
    state = segmenter.initial_state(2)
    features, _ = segmenter.read(text, doc_start, state)
    p = segmenter.outputs(features.before).softmax(dim=-1)
    bits = -(p * p.log2()).sum(dim=-1)
    cost = segmenter.next_byte_nats(features, text) / math.log(2)
    expected = {
        "threshold": bits,
        "rise": torch.cat([bits[:, :1], bits.diff(dim=1)], dim=1),
        "budget": cost.cumsum(dim=1) - cost,
    }[form]
    first, state = segmenter.signal(text[:, :9], doc_start[:, :9], state)
    rest, _ = segmenter.signal(text[:, 9:], doc_start[:, 9:], state)
    torch.testing.assert_close(torch.cat([first, rest], dim=1)[..., 0], expected)


def bits_by_byte(**bits: float) -> EntropySegmenter:
    """A budget's segmenter to which every byte costs what is said here, whatever came before."""
    segmenter = small_segmenter("entropy", entropy_form="budget")
    assert isinstance(segmenter, EntropySegmenter)
    with torch.no_grad():
        segmenter.outputs.weight.zero_()
        segmenter.outputs.bias.fill_(-1000)
        for letter, cost in bits.items():
            segmenter.outputs.bias[ord(letter)] = -cost * math.log(2)
    return segmenter


def test_a_chunk_ends_once_its_bytes_have_cost_more_than_the_budget():
    segmenter = bits_by_byte(a=1, b=2, c=3, d=3)  # probabilities of 1/2, 1/4, 1/8 and 1/8
    segmenter.threshold.fill_(3.5)
    for text in ("aaaa|aa", "bb|ca|aaaa|b", "da|da|cc|bb|a", "aaa"):
        chunks = text.split("|")
        is_start = segmenter.chunker(1, 100).chunk_start("".join(chunks).encode())
        assert np.flatnonzero(is_start).tolist() == np.cumsum([0, *map(len, chunks[:-1])]).tolist()
