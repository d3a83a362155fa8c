"""The target encoder follows exactly and learns nothing by itself; vectors of texts do not depend on their company."""

from __future__ import annotations

import pytest
import torch
from jepa_small import small

from hldm.chunking.chunker import make_chunker
from hldm.jepa.encoder import JepaEncoder, encode_texts, follow, follower_of, momentum_at

TEXTS = [b"In the beginning God made the heaven and the earth.", b"And", b" And the earth was waste, " * 4]


def encoder_of(*overrides: str) -> JepaEncoder:
    torch.manual_seed(0)
    config = small(*overrides)
    return JepaEncoder.from_settings(config.encoder, config.chunking, config.vector).eval()


def test_the_follower_is_the_weighted_sum_of_all_that_it_followed():
    model = encoder_of()
    follower = follower_of(model)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for step, momentum in enumerate((0.9, 0.5, 0.99)):
        torch.manual_seed(step)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p))
        follow(follower, model, momentum)
        for name, p in model.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * p.detach().double()
    found = {name: buffer.double() for name, buffer in follower.named_buffers()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_follower_has_no_parameters_and_shares_no_memory_but_gives_what_its_model_gave():
    model = encoder_of()
    follower = follower_of(model)
    assert not list(follower.parameters())
    config = small()
    chunker = make_chunker(config.chunking)
    before = encode_texts(model, TEXTS, chunker)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    copy = JepaEncoder.from_settings(config.encoder, config.chunking, config.vector)
    copy.load_state_dict(follower.state_dict())
    torch.testing.assert_close(encode_texts(copy.eval(), TEXTS, chunker), before, rtol=0, atol=0)


def test_the_momentum_rises_to_one():
    values = [momentum_at(0.99, progress) for progress in (0.0, 0.25, 0.5, 1.0, 1.1)]
    assert values[0] == pytest.approx(0.99) and values[2] == pytest.approx(0.995) and values[3:] == [1.0, 1.0]
    assert values == sorted(values)


def test_a_batch_of_texts_equals_each_by_itself():
    model, chunker = encoder_of(), make_chunker(small().chunking)
    together = encode_texts(model, TEXTS, chunker)
    for index, text in enumerate(TEXTS):
        alone = encode_texts(model, [text], chunker)
        torch.testing.assert_close(together.latents[index], alone.latents[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.features[index], alone.features[0], rtol=1e-4, atol=1e-5)


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="text 1 is empty"):
        encode_texts(encoder_of(), [b"a", b""], make_chunker(small().chunking))


def test_a_saved_encoder_is_read_back(tmp_path):
    model, chunker = encoder_of(), make_chunker(small().chunking)
    model.save_pretrained(tmp_path / "model")
    found = encode_texts(JepaEncoder.from_pretrained(tmp_path / "model").eval(), TEXTS, chunker)
    torch.testing.assert_close(found, encode_texts(model, TEXTS, chunker), rtol=0, atol=0)
