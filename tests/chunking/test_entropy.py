"""What `entropy` calls a border, on predictions made by hand."""

from __future__ import annotations

import torch

from hldm.chunking.entropy import entropy_in_bits
from tests.chunking.test_segmenter import random_text, small_segmenter

P = [
    [0.25, 0.25, 0.25, 0.25],
    [0.5, 0.25, 0.125, 0.125],
    [1, 1e-300, 1e-300, 1e-300],
    [0.5, 1e-300, 0.5, 1e-300],
]


def test_entropy_is_in_bits():
    found = entropy_in_bits(torch.tensor([P], dtype=torch.float64).log())
    torch.testing.assert_close(found, torch.tensor([2, 1.75, 0, 1], dtype=torch.float64)[None, :, None])


def test_a_segmenters_signal_is_the_entropy_of_its_own_next_byte():
    segmenter = small_segmenter("entropy")
    text, doc_start = random_text(2, 20)
    state = segmenter.initial_state(2)
    features, _ = segmenter.read(text, doc_start, state)
    p = segmenter.outputs(features.before).softmax(dim=-1)
    first, state = segmenter.signal(text[:, :9], doc_start[:, :9], state)
    rest, _ = segmenter.signal(text[:, 9:], doc_start[:, 9:], state)
    assert segmenter.rule == "level"
    torch.testing.assert_close(torch.cat([first, rest], dim=1)[..., 0], -(p * p.log2()).sum(dim=-1))
