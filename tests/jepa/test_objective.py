"""Every option trains, its gradients go where they should, and targets know neither the future nor a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from jepa_small import objective_of, small, windows_of

from hldm.config import ConfigError
from hldm.jepa.config import OPTIONS, ObjectiveConfig, PlacedView
from hldm.jepa.decoder import ChunkDecoder, chunk_bytes
from hldm.jepa.objective import DecoderObjective, JepaObjective
from hldm.jepa.predictor import Predictor
from hldm.jepa.views import make_view

SWITCHES = [
    *([f"objective.option={option}"] for option in OPTIONS),
    *([f"objective.distance={name}"] for name in ("l1", "l2", "cosine")),
    *([f"objective.target={name}"] for name in ("own", "gradient")),
    *([f"objective.normalise={name}"] for name in ("none", "layer_norm")),
    ["objective.reset_targets=false", "predictor.kind=griffin", "views.hole_bytes=0"],
    ["objective.variance=1", "objective.covariance=0.04", "objective.sigreg=0.02"],
    ["objective.option=latents", "objective.next_byte_weight=1"],
    *([f"views.kind={kind}"] for kind in get_args(PlacedView)),
]


def step(
    objective: JepaObjective | DecoderObjective, batch, carry=None, seed: int = 0, progress: float = 0.5
):
    carry = objective.initial_carry(len(batch.bytes), torch.device("cpu")) if carry is None else carry
    return objective(batch, carry, torch.Generator().manual_seed(seed), progress)


@pytest.mark.parametrize("switches", SWITCHES, ids=" ".join)
def test_a_few_steps_lower_the_loss_and_reach_every_part(switches):
    config = small(*switches)
    objective, batch = objective_of(config).train(), windows_of(config).batch(0)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        out = step(objective, batch, progress=1.0)  # the target stands still
        optimizer.zero_grad()
        out.loss.backward()
        objective.end_step(skipped=False)
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.97 * losses[2]  # the scale of targets is not known at the first step
    untouched = [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in untouched if "bias" not in name] == []


@pytest.mark.parametrize("target", ["ema", "own"])
def test_no_gradient_reaches_the_targets(target):
    config = small(f"objective.target={target}", "objective.option=latents")
    objective, batch = objective_of(config).train(), windows_of(config).batch(0)
    encoded = objective.targets(batch, batch.is_chunk, None)
    assert not encoded.vectors.requires_grad
    assert not [name for name, _ in objective.named_parameters() if name.startswith("target")]


def test_a_target_with_a_gradient_is_a_switch():
    config = small("objective.target=gradient", "objective.option=latents")
    objective, batch = objective_of(config).train(), windows_of(config).batch(0)
    assert objective.targets(batch, batch.is_chunk, None).vectors.requires_grad


def test_a_target_sees_neither_what_comes_after_nor_with_a_reset_what_came_before():
    config = small("objective.option=latents")
    objective, batch = objective_of(config).eval(), windows_of(config).batch(0)
    wanted = torch.zeros_like(batch.is_chunk)
    wanted[:, 3:5] = True
    plain = objective.targets(batch, wanted, None).vectors[wanted]
    first, last = batch.first_byte[:, 3], batch.last_byte[:, 4]
    place = torch.arange(batch.bytes.shape[1])
    outside = (place < first[:, None]) | (place > last[:, None])
    other = replace(batch, bytes=torch.where(outside & batch.is_real, 65, batch.bytes))
    torch.testing.assert_close(objective.targets(other, wanted, None).vectors[wanted], plain, rtol=0, atol=0)
    config = small("objective.option=latents", "objective.reset_targets=false")
    knows = objective_of(config).eval()
    before, after = (knows.targets(part, wanted, None).vectors[wanted] for part in (batch, other))
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["griffin", "transformer"])
def test_a_predictor_sees_no_other_document_and_griffin_no_later_chunk(kind):
    torch.manual_seed(0)
    config = small(f"predictor.kind={kind}")
    predictor = Predictor.from_settings(config.predictor, 16).eval()
    vectors, count = torch.randn(1, 8, 16), torch.tensor([7])
    hidden = torch.zeros(1, 8, dtype=torch.bool)
    opens = hidden.clone()
    opens[0, 4] = True
    found = predictor(vectors, hidden, opens, count)
    changed = vectors.clone()
    changed[0, 4:] += 1  # the second document and padding
    torch.testing.assert_close(predictor(changed, hidden, opens, count)[:, :4], found[:, :4])
    changed = vectors.clone()
    changed[0, 3] += 1
    other = predictor(changed, hidden, opens, count)
    torch.testing.assert_close(other[:, 4:7], found[:, 4:7])
    assert ((other - found)[0, 0].abs().max() > 1e-6) == (kind == "transformer")


def test_an_untouched_end_step_follows_with_the_momentum_of_the_progress():
    config = small("objective.option=latents", "objective.momentum=0.5")
    objective, batch = objective_of(config).train(), windows_of(config).batch(0)
    with torch.no_grad():
        for p in objective.encoder.parameters():
            p.add_(0.1)
    name = "read.weight"
    target, own = objective.target.get_buffer(name).clone(), objective.encoder.get_parameter(name).detach()
    step(objective, batch, progress=0.0)
    objective.end_step(skipped=True)
    torch.testing.assert_close(objective.target.get_buffer(name), target, rtol=0, atol=0)
    objective.end_step(skipped=False)
    torch.testing.assert_close(objective.target.get_buffer(name), 0.5 * target + 0.5 * own)


@pytest.mark.parametrize("option", OPTIONS)
def test_rows_of_a_batch_add_up_to_the_batch(option):
    config = small(f"objective.option={option}")
    windows, found = windows_of(config), []
    for parts in ([(0, 4)], [(0, 1), (1, 2), (3, 1)]):
        objective = objective_of(config).train()
        total = 0.0
        for first, rows in parts:
            out = step(objective, windows.batch(0, first, rows))
            out.loss.backward()
            total += out.loss.item()
        objective.end_step(skipped=False)
        found.append(
            (total, {n: p.grad for n, p in objective.named_parameters()}, dict(objective.named_buffers()))
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-3, atol=1e-5)


def test_state_is_carried_from_window_to_window():
    config = small("views.kind=none", "objective.reset_targets=false", "objective.option=latents")
    objective, windows = objective_of(config).eval(), windows_of(config)
    first = step(objective, windows.batch(0))
    second = windows.batch(1)
    going_on = objective.encoder(second, first.carry.context).vectors
    afresh = objective.encoder(second, objective.encoder.initial_state(4)).vectors
    assert (going_on - afresh).abs().max() > 1e-3
    torch.testing.assert_close(first.carry.target, first.carry.context)  # the follower is still its model


def test_the_decoders_nats_are_those_of_its_own_symbols_one_by_one():
    torch.manual_seed(0)
    config = small()
    decoder = ChunkDecoder.from_settings(config.decoder, config.chunking, 16).eval()
    batch = windows_of(config).batch(0)
    text, length = chunk_bytes(batch, batch.is_chunk)
    vectors = torch.randn(len(text), 16)
    nats = decoder.nats(vectors, text, length)
    for index in (0, 5):
        symbols = text[index, : length[index]]
        logits = decoder.logits(vectors[index, None], torch.cat([torch.tensor([258]), symbols])[None])
        logp = logits.log_softmax(-1)[0].gather(1, torch.cat([symbols, torch.tensor([256])])[:, None])
        torch.testing.assert_close(nats[index], -logp.sum(), rtol=1e-4, atol=1e-4)


def test_what_a_decoder_writes_is_its_likeliest_text():
    torch.manual_seed(0)
    config = small()
    decoder = ChunkDecoder.from_settings(config.decoder, config.chunking, 16)
    texts, vectors = [b" and", b" kings", b"."], torch.randn(3, 16)
    padded = torch.tensor([list(text.ljust(6, b"\0")) for text in texts])
    length = torch.tensor([len(text) for text in texts])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(60):
        loss = decoder.nats(vectors, padded, length).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert decoder.write_chunks(vectors) == texts and decoder.write_chunks(vectors[:0]) == []


def test_a_decoder_trained_afterwards_leaves_the_encoder_alone():
    config = small("objective.option=latents")
    jepa, batch = objective_of(config), windows_of(config).batch(0)
    decoder = ChunkDecoder.from_settings(config.decoder, config.chunking, config.vector)
    objective = DecoderObjective(jepa, decoder).train()
    out = step(objective, batch)
    out.loss.backward()
    assert out.nats.keys() == {"own", "predicted"} and not jepa.training
    assert all(p.grad is None for p in jepa.parameters()) and decoder.outputs.weight.grad.any()


def test_figures_on_held_out_text_are_the_same_when_asked_twice_and_change_nothing():
    config = small()
    objective, batch = objective_of(config).train(), windows_of(config).batch(0)
    objective.watch(batch)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    signs = objective.signs()
    assert signs == objective.signs() and objective.training and not objective.target.training
    assert signs["rank"] == signs["untrained_rank"] > 1 and {"r2_beyond_length", "shuffle_gap"} < signs.keys()
    torch.testing.assert_close(dict(objective.state_dict()), before, rtol=0, atol=0)


def test_a_batch_that_hides_nothing_has_a_loss_all_the_same():
    config = small("objective.option=masked")
    objective, batch = objective_of(config).train(), windows_of(config).batch(0)
    one = replace(batch, chunk_start=batch.doc_start | (torch.arange(batch.bytes.shape[1]) == 0), chunks=1)
    assert not make_view(one, config.views, torch.Generator(), objective.letters).hidden.any()
    step(objective, one).loss.backward()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("views.share=0", "nothing is hidden to be predicted"),
        ("views.hole_bytes=11", "hole_bytes must not exceed chunking.max_bytes"),
        ("predictor.width=20", "predictor.width must be divisible by 4 times the heads"),
        ("objective.option=latent", "objective.option"),
        ("training.jepa.gradient_checkpointing=true", "gradient_checkpointing=true is no setting any more"),
    ],
)
def test_settings_that_cannot_be_are_refused(override, says):
    with pytest.raises(ConfigError, match=says):
        small(override)


def test_statistics_of_a_batch_need_the_whole_batch():
    with pytest.raises(ConfigError, match="accumulation must be 1"):
        small("objective.variance=1", "training.accumulation=2")
    assert set(get_args(ObjectiveConfig.model_fields["option"].annotation)) == OPTIONS.keys()
