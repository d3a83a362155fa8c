"""The bound on a source of known entropy: 27 symbols in 5 dimensions, the exact denoiser and the exact decoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hldm.model.diffusion import Schedule, alpha_sigma, bound_integrand, diffuse, end_term
from tests.model.test_diffusion import KINDS, noise_to, normal, seeded, teach


class Source:
    """Symbols drawn with known probabilities, each with a fixed embedding, standardised."""

    def __init__(self, scale: float = 1.0) -> None:
        self.probability = torch.softmax(normal(27), 0)
        embedding = normal(27, 5, seed=1)
        mean = self.probability @ embedding
        std = (self.probability @ (embedding - mean).square()).sqrt()
        self.embedding = scale * (embedding - mean) / std
        self.entropy_bits = -(self.probability @ self.probability.log2()).item()

    def log_posterior(self, z: Tensor, gamma: Tensor) -> Tensor:
        """log p(symbol | z_gamma): (... 5) and (...) -> (... 27)."""
        alpha, sigma = alpha_sigma(gamma.unsqueeze(-1))
        half_norm = self.embedding.square().sum(-1) / 2
        log_likelihood = alpha * (z @ self.embedding.T - alpha * half_norm) / sigma.square()
        return torch.log_softmax(self.probability.log() + log_likelihood, -1)

    def x0_hat(self, z: Tensor, gamma: Tensor) -> Tensor:
        return self.log_posterior(z, gamma).exp() @ self.embedding

    def schedule(self, kind: str, gamma_0: float) -> Schedule:
        schedule = Schedule(noise_to(10.0)(gamma_0=gamma_0))
        for seed in range(10 if kind == "learned" else 0):
            symbol = torch.multinomial(self.probability, 8000, replacement=True, generator=seeded(seed))
            x0 = self.embedding[symbol]
            gamma = schedule.gamma(torch.rand(8000, generator=seeded(seed), dtype=torch.float64))
            x0_hat = self.x0_hat(diffuse(x0, gamma, normal(8000, 5, seed=seed)), gamma)
            teach(schedule, gamma, (x0 - x0_hat).square().sum(-1))
        return schedule

    def latent_bits(self, schedule: Schedule, u: Tensor, noise: Tensor) -> Tensor:
        """f / p of one draw a row, for every symbol: u (rows), noise (rows 5) -> (rows 27)."""
        gamma = schedule.gamma(u)[:, None].expand(-1, 27)
        x0 = self.embedding.expand(len(u), 27, 5)
        x0_hat = self.x0_hat(diffuse(x0, gamma, noise[:, None]), gamma)
        return bound_integrand(x0, x0_hat, gamma) / schedule.density(gamma) / math.log(2)

    def decoder_bits(self, gamma_0: float, noise: Tensor) -> float:
        gamma = torch.full((len(noise), 27), gamma_0, dtype=torch.float64)
        z_0 = diffuse(self.embedding.expand(len(noise), 27, 5), gamma, noise[:, None])
        log_p = self.log_posterior(z_0, gamma).diagonal(dim1=-2, dim2=-1)
        return -(log_p.mean(0) @ self.probability).item() / math.log(2)

    def end_bits(self) -> float:
        return (end_term(self.embedding, 10.0) @ self.probability).item() / math.log(2)


def spread_draws(rows: int) -> tuple[Tensor, Tensor]:
    """u (rows) and noise (rows 5), each uniform or normal and together evenly spread (Sobol points).

    At gamma_0 = -3 few draws confuse two symbols and those cost much: independent ones would take ten
    times as many rows for the same error.
    """
    points = torch.quasirandom.SobolEngine(6, scramble=True, seed=0).draw(rows, dtype=torch.float64)
    return points[:, 0], torch.special.ndtri(points[:, 1:].clamp(1e-12, 1 - 1e-12))


@pytest.mark.parametrize("gamma_0", [-3.0, 0.0, 2.0])
def test_the_bound_of_a_perfect_model_is_the_entropy_under_every_schedule(gamma_0):
    source = Source()
    u, noise = spread_draws(2**15)
    rest = source.decoder_bits(gamma_0, noise) + source.end_bits()
    for kind in KINDS:
        draws = source.latent_bits(source.schedule(kind, gamma_0), u, noise)
        latent = (draws.mean(0) @ source.probability).item()
        assert latent > 0.3
        assert latent + rest == pytest.approx(source.entropy_bits, abs=0.02), kind


@pytest.mark.parametrize("gamma_0", [-3.0, 0.0])
def test_a_learned_schedule_estimates_the_bound_with_less_variance(gamma_0):
    source = Source()
    uniform = source.schedule("uniform", gamma_0)
    u, noise = spread_draws(2**15)
    gamma, draws = uniform.gamma(u), source.latent_bits(uniform, u, noise)
    # E_p[(f / p)^2] = E_uniform[(f / uniform)^2 uniform / p]: the same draws serve every density
    square = draws.square() @ source.probability
    mean = draws.mean(0) @ source.probability
    variance = {}
    for kind in KINDS:
        weight = uniform.density(gamma) / source.schedule(kind, gamma_0).density(gamma)
        variance[kind] = ((square * weight).mean() - mean.square()).item()
    assert variance["learned"] < 0.4 * variance["uniform"]


def test_a_constant_latent_costs_nothing_and_tells_nothing():
    source = Source(scale=0.0)
    u, noise = spread_draws(8)
    assert (source.latent_bits(source.schedule("learned", -3.0), u, noise) == 0).all()
    assert source.end_bits() < 1e-7
    assert source.decoder_bits(-3.0, noise) == pytest.approx(source.entropy_bits)
