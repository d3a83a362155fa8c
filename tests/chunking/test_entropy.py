"""What `entropy` calls a border: the entropy, in bits, of its own prediction."""

from __future__ import annotations

import torch

from tests.chunking.test_segmenter import random_text, small_segmenter


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
