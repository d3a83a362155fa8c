"""All denoising steps in one call of C++ are the steps of torch, whose solver is diffusers'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hldm.config import (
    AutoencoderConfig,
    DiffusionConfig,
    GriffinConfig,
    HierarchyConfig,
    PriorConfig,
    changed,
)
from hldm.generation.writer import row_generators
from hldm.kernels.denoise import PlannedSteps
from hldm.model.denoiser import Conditioning
from hldm.model.diffusion import draw_numbers, sample, sampler_steps
from hldm.model.prior import Prior

Z = 3


def make_prior(layers: int = 2, components: int = 20, **settings) -> Prior:
    """Every parameter away from 0, and pooled entries of two levels."""
    torch.manual_seed(0)
    griffin = GriffinConfig(width=24, blocks=("recurrent",), heads=2)
    autoencoder = AutoencoderConfig(
        latent_dim=Z, encoder=griffin, decoder=griffin, reads_text=True, trunk_layers=0, components=components
    )
    config = PriorConfig(reads_text=True, width=16, layers=1, heads=2, denoiser_layers=layers)
    prior = Prior.from_settings(
        autoencoder,
        changed(config, **settings),
        HierarchyConfig(levels=2, ratio=2, window=2),
        DiffusionConfig(gamma_0=-2.0),
    )
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return prior.eval()


def read(prior: Prior, rows: int) -> Conditioning:
    """What a prior knows after eleven chunks, of which some rows have fewer in their document."""
    torch.manual_seed(rows)
    n, feature_dim = 11, prior.contextualiser.feature_dim
    doc_start = torch.zeros(rows, n, dtype=torch.bool)
    doc_start[::2, 7] = True
    mask = torch.ones(rows, n, dtype=torch.bool)
    features = torch.randn(rows, n, feature_dim)
    with torch.no_grad():
        context, _ = prior.contextualiser(
            torch.randn(rows, n, Z), mask, doc_start, prior.initial_state(rows), features
        )
        return prior.condition(context.of(torch.full((rows, 1), n)))


@pytest.mark.parametrize("rows", [1, 3, 12, 40])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "scheduler, temperature",
    [("ancestral", 1.0), ("ancestral", 0.6), ("ancestral", 0.0), ("ddim", 0.9), ("dpm", 0.9)],
)
def test_one_call_draws_what_torch_draws(plain_torch, scheduler, temperature, layers, rows):
    prior = make_prior(layers)
    conditioning, plan = read(prior, rows), sampler_steps(scheduler, prior.schedule, 5)

    def denoise(z: Tensor, gamma: Tensor) -> Tensor:
        return prior.denoise(z[:, None, None], gamma[:, None, None], conditioning)[:, 0, 0]

    def spread(z: Tensor, gamma: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return prior.spread(z, gamma, conditioning, u, temperature)

    draws = scheduler == "ancestral"
    uniform, noise = draw_numbers(plan, (rows, Z), row_generators(1, rows), temperature, "cpu")
    with torch.no_grad():
        planned = PlannedSteps(prior, plan)
        numbers = (conditioning, noise, uniform if draws else None, temperature)
        found = planned.draw(*numbers)
        torch.testing.assert_close(planned.draw(*numbers), found, rtol=0, atol=0)
    with plain_torch(), torch.no_grad():
        expected = sample(
            denoise, (rows, Z), plan, row_generators(1, rows), temperature, spread=spread if draws else None
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
