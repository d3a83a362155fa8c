"""Every choice of the config trains: finite loss, gradients that reach every part, the same for any split."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT, SMALL, built_in_text

from hldm.chunking.chunker import make_chunker
from hldm.config import Config, load_config
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.text.windows import Windows
from hldm.training.objectives import AutoencoderObjective, PriorObjective, Step


def small(*overrides: str) -> Config:
    return load_config([ROOT / "configs/tiny.yaml"], [*SMALL, *overrides])


@pytest.fixture(autouse=True)
def hidden_often(monkeypatch):
    """Contexts, so that a few chunks suffice to see it."""
    monkeypatch.setattr("hldm.model.prior.CONTEXT_DROPOUT", 0.5)


def make_objective(config: Config, stage: str) -> AutoencoderObjective | PriorObjective:
    torch.manual_seed(0)
    autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking)
    if stage == "autoencoder":
        return AutoencoderObjective(autoencoder, config.autoencoder, config.diffusion.gamma_0)
    prior = Prior.from_settings(config.autoencoder, config.prior, config.hierarchy, config.diffusion)
    for parameter in prior.parameters():
        if not parameter.any():  # what starts at zero lets no gradient through
            torch.nn.init.normal_(parameter, std=0.1)
    return PriorObjective(prior, autoencoder)


def make_windows(config: Config) -> Windows:
    return Windows(built_in_text(), make_chunker(config.chunking), lanes=4, window_bytes=64)


def run(objective, config: Config, steps: int = 3, progress: float = 0.9) -> Step:
    """A few steps without an optimizer; gradients of the last stay."""
    windows = make_windows(config)
    carry = objective.initial_carry(4, torch.device("cpu"))
    objective.train()
    for index in range(steps):
        objective.zero_grad()
        torch.manual_seed(index)
        out = objective(windows.batch(index), carry, torch.Generator().manual_seed(index), progress)
        out.loss.backward()
        objective.end_step(skipped=False)
        carry = out.carry
    assert torch.isfinite(out.loss)
    return out


CHOICES = [
    [],
    ["autoencoder.components=0"],
    ["autoencoder.carry_state=true"],
    ["prior.reads_text=false", "autoencoder.reads_text=false"],
    ["hierarchy.levels=0"],
    ["chunking.strategy=sentence", "chunking.max_bytes=30"],
    [
        "autoencoder.pooling=strided",
        *("chunking.strategy=fixed", "chunking.min_bytes=7", "chunking.max_bytes=7"),
    ],
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: " ".join(choice) or "default")
@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_gradients_reach_every_part_under_every_choice(stage, choice):
    config = small(*choice)
    objective = make_objective(config, stage)
    run(objective, config)
    untouched = [
        name
        for name, parameter in objective.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not [name for name in untouched if "bias" not in name]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: " ".join(choice) or "default")
@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_an_objective_knows_whether_a_step_may_leave_out_parameters(stage, choice):
    config = load_config([ROOT / "configs/tiny.yaml"], [*SMALL, *choice])
    objective = make_objective(config, stage)
    left_out = set()
    for progress in (0.0, 0.9):
        run(objective, config, 1, progress)
        left_out |= {n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None}
        objective.zero_grad()
    assert bool(left_out) == objective.may_leave_out, left_out


def test_the_twin_trains_without_latents():
    config = load_config(
        [ROOT / "configs/tiny-twin.yaml"],
        [o for o in SMALL if "latent_dim" not in o] + ["data.window_bytes=64"],
    )
    out = run(make_objective(config, "autoencoder"), config)
    assert out.nats.keys() == {"decoder"} and out.carry.encoder is None


def test_a_frozen_autoencoder_stays_as_it_is():
    config = small()
    objective = make_objective(config, "prior")
    before = {k: v.clone() for k, v in objective.autoencoder.state_dict().items()}
    run(objective, config)
    assert all(p.grad is None for p in objective.autoencoder.parameters())
    torch.testing.assert_close(dict(objective.autoencoder.state_dict()), before, rtol=0, atol=0)


def test_rows_of_a_batch_add_up_to_the_batch():
    config = small()
    windows = make_windows(config)
    losses = []
    for parts in ([(0, 4)], [(0, 1), (1, 2), (3, 1)]):
        objective = make_objective(config, "autoencoder").train()
        total = 0.0
        for first, rows in parts:
            carry = objective.initial_carry(rows, torch.device("cpu"))
            generator = torch.Generator().manual_seed(5)
            out = objective(windows.batch(0, first, rows), carry, generator, 0.0)
            out.loss.backward()
            total += out.loss.item()
        losses.append((total, {name: p.grad for name, p in objective.named_parameters()}))
        objective.end_step(skipped=False)
        losses[-1] += (dict(objective.named_buffers()),)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses[0][2], losses[1][2], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_and_bfloat16_change_memory_not_the_loss():
    config = small()
    plain = make_objective(config, "autoencoder")
    loss = run(plain, config).loss.item()
    frugal = make_objective(config, "autoencoder")
    frugal.autoencoder.enable_gradient_checkpointing()
    assert run(frugal, config).loss.item() == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(
        {name: p.grad for name, p in frugal.named_parameters()},
        {name: p.grad for name, p in plain.named_parameters()},
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(make_objective(config, "autoencoder"), config).loss.item()
    assert half == pytest.approx(loss, rel=0.01)
