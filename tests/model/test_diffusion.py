"""The schedule's identities, the targets', samplers on a known Gaussian."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hldm.config import ConfigError, DiffusionConfig
from hldm.model import diffusion
from hldm.model.diffusion import (
    BINS,
    UNIFORM_SHARE,
    Schedule,
    alpha_sigma,
    diffuse,
    draw_numbers,
    end_term,
    make_scheduler,
    sample,
    sampler_steps,
    scheduler_name,
    stratified,
    x0_from,
)

KINDS = ["uniform", "learned"]
SCHEDULERS = ["ancestral", "ddim", "dpm"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def teach(schedule: Schedule, gamma: Tensor, squared_error: Tensor) -> None:
    schedule.observe(gamma, squared_error)
    schedule.update()


def noise_to(gamma_1: float) -> type[DiffusionConfig]:
    """Settings of a process that ends in other noise than models have."""
    return type("Ending", (DiffusionConfig,), {"gamma_1": gamma_1})


def make_schedule(kind: str, gamma_0: float = -3.0, gamma_1: float = 10.0) -> Schedule:
    """A fresh schedule, or one that has seen an integrand with a hump, and nothing of the noisiest bins."""
    schedule = Schedule(noise_to(gamma_1)(gamma_0=gamma_0))
    if kind == "learned":
        gamma = torch.linspace(gamma_0, gamma_1 - 1, 1001)
        teach(schedule, gamma, torch.exp(gamma - gamma**2 / 4))
    return schedule


# the schedule


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_rises_from_end_to_end_exactly(kind, dtype):
    gamma = make_schedule(kind).gamma(torch.linspace(0, 1, 1001, dtype=dtype))
    assert gamma[0] == -3.0 and gamma[-1] == 10.0
    assert (gamma.diff() > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_density_is_the_slope_of_the_inverse_of_gamma(kind):
    schedule = make_schedule(kind)
    midpoints = torch.linspace(-3, 10, 20 * BINS + 1, dtype=torch.float64)[:-1] + 6.5 / (20 * BINS)
    density = schedule.density(midpoints)
    share_below = (density * 13 / (20 * BINS)).cumsum(0)
    assert share_below[-1] == pytest.approx(1, abs=1e-12)

    # gamma(u) is where the share u of the density lies below
    borders = torch.linspace(-3, 10, 20 * BINS + 1, dtype=torch.float64)[1:]
    torch.testing.assert_close(schedule.gamma(share_below.clamp(max=1)), borders)

    # d gamma / d u = 1 / p inside every bin
    u = (schedule.cdf[1:] + schedule.cdf[:-1]).double() / 2
    slope = (schedule.gamma(u + 1e-7) - schedule.gamma(u - 1e-7)) / 2e-7
    torch.testing.assert_close(slope * schedule.density(schedule.gamma(u)), torch.ones_like(u))


def test_learned_density_is_the_root_mean_square_of_the_integrand_and_some_uniform():
    schedule = Schedule(DiffusionConfig(gamma_0=0.0))
    gamma = (torch.arange(BINS) + 0.5) * 5 / BINS
    root_mean_square = torch.arange(BINS).float()
    for share in (0.5, 1.5):  # of the mean square
        squared_error = 2 * torch.exp(gamma) * root_mean_square * math.sqrt(share)
        teach(schedule, gamma.repeat(3), squared_error.repeat(3))
    expected = UNIFORM_SHARE + (1 - UNIFORM_SHARE) * root_mean_square / root_mean_square.mean()
    torch.testing.assert_close(schedule.density(gamma) * 5, expected, atol=0, rtol=0.01)


def test_nothing_to_learn_from_leaves_the_schedule_uniform():
    schedule = Schedule(DiffusionConfig())
    uniform = schedule.cdf.clone()
    teach(schedule, torch.zeros(0), torch.zeros(0))  # a process whose rows have run out
    teach(schedule, torch.linspace(-2, 5, 100), torch.zeros(100))  # a constant latent
    teach(schedule, torch.zeros(2), torch.tensor([math.inf, math.nan]))  # an overflow
    torch.testing.assert_close(schedule.cdf, uniform)
    with pytest.raises(ValueError, match="share a shape"):
        teach(schedule, torch.zeros(2), torch.zeros(3))


def test_a_learned_schedule_is_saved_with_the_model():
    taught, loaded = make_schedule("learned"), Schedule(noise_to(10.0)(gamma_0=-3.0))
    loaded.load_state_dict(taught.state_dict())
    assert torch.equal(
        loaded.gamma(torch.rand(9, generator=seeded(1))), taught.gamma(torch.rand(9, generator=seeded(1)))
    )
    for schedule in (taught, loaded):
        teach(schedule, torch.ones(5), torch.ones(5))
    assert torch.equal(loaded.cdf, taught.cdf)


def test_what_is_learned_does_not_depend_on_which_process_holds_a_row(monkeypatch):
    gamma = torch.rand(5000, generator=seeded()) * 7 - 2
    squared_error = torch.randn(5000, generator=seeded(1)).square() * torch.exp(gamma)
    whole = Schedule(DiffusionConfig())
    teach(whole, gamma, squared_error)

    shuffled = Schedule(DiffusionConfig())
    order = torch.randperm(5000, generator=seeded(2))
    teach(shuffled, gamma[order], squared_error[order])
    torch.testing.assert_close(shuffled.observed, whole.observed)

    in_parts = Schedule(DiffusionConfig())  # micro-batches
    for part in (slice(0, 1000), slice(1000, 5000)):
        in_parts.observe(gamma[part], squared_error[part])
    in_parts.update()
    torch.testing.assert_close(in_parts.observed, whole.observed)

    # three processes, in turn: each hands in its sums, then each receives the total
    rows = [slice(0, 17), slice(17, 3000), slice(3000, 5000)]
    sums: list[Tensor] = []
    monkeypatch.setattr(diffusion.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(diffusion.dist, "all_reduce", lambda part: sums.append(part.clone()))
    for part in rows:
        teach(Schedule(DiffusionConfig()), gamma[part], squared_error[part])
    total = sums[0] + sums[1] + sums[2]
    monkeypatch.setattr(diffusion.dist, "all_reduce", lambda part: part.copy_(total))
    for part in rows:
        split = Schedule(DiffusionConfig())
        teach(split, gamma[part], squared_error[part])
        torch.testing.assert_close(split.observed, whole.observed)
        torch.testing.assert_close(split.cdf, whole.cdf)


def test_stratified_draws_fall_one_into_each_stratum():
    u = stratified(8, torch.rand(5, 3, generator=seeded()))
    assert u.shape == (5, 3, 8)
    assert torch.equal((u * 8).floor(), torch.arange(8.0).expand(5, 3, 8))


# targets


def test_a_perfect_prediction_gives_x0_back():
    gamma = torch.linspace(-20, 20, 9, dtype=torch.float64)
    x0, noise = normal(9, 4), normal(9, 4, seed=1)
    z = diffuse(x0, gamma, noise)
    alpha, sigma = alpha_sigma(gamma.unsqueeze(-1))
    x0_hat = x0_from(alpha * noise - sigma * x0, z, gamma)
    torch.testing.assert_close(x0_hat, x0, atol=1e-10, rtol=0)


def test_end_term_is_the_divergence_from_a_standard_normal():
    mu, gamma_1 = normal(6, 3), 1.5
    alpha, sigma = alpha_sigma(torch.tensor(gamma_1, dtype=torch.float64))
    q = torch.distributions.Normal(alpha * mu, sigma)
    p = torch.distributions.Normal(torch.zeros_like(mu), 1.0)
    torch.testing.assert_close(end_term(mu, gamma_1), torch.distributions.kl_divergence(q, p).sum(-1))


# samplers, on x0 ~ N(mean, std^2) with the exact denoiser


MEAN, STD = torch.tensor([0.5, -1.0]), torch.tensor([0.7, 1.2])


def denoise_gaussian(z: Tensor, gamma: Tensor) -> Tensor:
    """E[x0 | z_gamma], coordinates alternating between the two Gaussians."""
    alpha, sigma = alpha_sigma(gamma[:, None])
    pairs = z.shape[1] // 2
    mean, variance = MEAN.repeat(pairs), STD.square().repeat(pairs)
    gain = variance * alpha / (alpha.square() * variance + sigma.square())
    return mean + gain * (z - alpha * mean)


def draw_gaussian(name: str, rows: int = 4, width: int = 6, **settings) -> Tensor:
    settings = {"steps": 8, "schedule": make_schedule("learned", -2.0, 12.0), "first_seed": 0} | settings
    generators = [seeded(settings["first_seed"] + row) for row in range(rows)]
    plan = sampler_steps(name, settings["schedule"], settings["steps"])
    return sample(denoise_gaussian, (rows, width), plan, generators, settings.get("temperature", 1.0))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_diffusion_state_at_gamma_0(name, kind):
    schedule = make_schedule(kind, -2.0, 12.0)
    z = draw_gaussian(name, rows=32, width=2048, steps=200, schedule=schedule, first_seed=99)
    z = z.view(-1, 2)
    alpha, sigma = alpha_sigma(torch.tensor(-2.0))
    variance = alpha.square() * STD.square() + sigma.square()
    standard_error = (variance / len(z)).sqrt()
    assert ((z.mean(0) - alpha * MEAN).abs() < 4 * standard_error).all()
    # 4 standard errors, 2.2 %, and the error of 200 steps of first order, under 4 %
    torch.testing.assert_close(z.var(0), variance, rtol=0.06, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7, 16])
def test_every_scheduler_visits_the_quantiles_of_the_schedule(steps):
    schedule = make_schedule("learned")
    levels = schedule.gamma(torch.linspace(1, 0, steps + 1))
    x0 = normal(1, 6).float()
    for name in SCHEDULERS:
        visited: list[float] = []

        def denoise(z, gamma, visited=visited):
            visited.append(gamma.item())
            return x0

        z = sample(denoise, (1, 6), sampler_steps(name, schedule, steps), [seeded()], temperature=0.0)
        assert visited == levels[:-1].tolist()
        # without noise, a known x0 leads to a known place: only the level of each step decides
        expected = torch.zeros(1, 6)
        for gamma_t, gamma_s in itertools.pairwise(levels):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(gamma_t), alpha_sigma(gamma_s)
            if name in ("ancestral", "dpm"):
                kept = torch.exp(gamma_s - gamma_t) * alpha_s / alpha_t
                expected = kept * expected - torch.expm1(gamma_s - gamma_t) * alpha_s * x0
            else:
                expected = alpha_s * x0 + sigma_s * (expected - alpha_t * x0) / sigma_t
        torch.testing.assert_close(z, expected, atol=2e-4, rtol=1e-3)


def test_ancestral_sampling_draws_from_the_posterior_of_vdm():
    schedule, steps = make_schedule("learned", -2.0, 12.0), 5
    levels = schedule.gamma(torch.linspace(1, 0, steps + 1))
    _, noise = draw_numbers(sampler_steps("ancestral", schedule, steps), (1, 6), [seeded()], 1.0, "cpu")
    z = noise[0]
    for (gamma_t, gamma_s), eps in zip(itertools.pairwise(levels), noise[1:], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(gamma_t), alpha_sigma(gamma_s)
        variance_ts = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
        x0_hat = denoise_gaussian(z, gamma_t[None])
        mean = (alpha_t / alpha_s * sigma_s**2 * z + alpha_s * variance_ts * x0_hat) / sigma_t**2
        z = mean + (variance_ts * sigma_s**2 / sigma_t**2).sqrt() * eps
    torch.testing.assert_close(draw_gaussian("ancestral", rows=1, steps=steps), z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_batch_equals_its_rows_and_a_seed_its_repeat(name):
    batch = draw_gaussian(name)
    assert torch.equal(batch, draw_gaussian(name))
    rows = [draw_gaussian(name, rows=1, first_seed=row) for row in range(4)]
    assert torch.equal(batch, torch.cat(rows))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_temperature_narrows_the_samples_down_to_one(name):
    spread = [draw_gaussian(name, rows=64, temperature=t).var(0).mean() for t in (0.0, 0.5, 1.0)]
    assert spread[0] == 0
    # a linear denoiser: half the noise is a quarter of the variance
    torch.testing.assert_close(4 * spread[1], spread[2], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_denoiser_in_half_precision_leaves_the_state_in_float32(name):
    schedule = make_schedule("uniform", -2.0, 5.0)
    z = sample(
        lambda z, gamma: denoise_gaussian(z, gamma).bfloat16(),
        (2, 6),
        sampler_steps(name, schedule, 4),
        [seeded(0), seeded(1)],
    )
    assert z.dtype == torch.float32 and not torch.equal(z, z.bfloat16().float())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_saved_scheduler_loads_with_its_name_and_its_table(name, tmp_path):
    made = make_scheduler(name, make_schedule("learned"), 12)
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path)
    assert scheduler_name(type(loaded).__name__, loaded.config.get("solver_order")) == name
    assert loaded.config.num_train_timesteps == 13
    assert torch.equal(loaded.alphas_cumprod, made.alphas_cumprod)


def test_what_cannot_be_sampled_is_refused_at_the_door():
    schedule = make_schedule("uniform")
    with pytest.raises(ValueError, match="one generator a row, got 1 for 2 rows"):
        sample(denoise_gaussian, (2, 6), sampler_steps("ddim", schedule, 2), [seeded()])
    with pytest.raises(ValueError, match="got 'euler' of 4"):
        make_scheduler("euler", schedule, 4)
    with pytest.raises(ValueError, match="at least 1"):
        make_scheduler("dpm", schedule, 0)
    with pytest.raises(ValueError, match="'UniPCMultistepScheduler' is not one"):
        scheduler_name("UniPCMultistepScheduler", 2)
    with pytest.raises(ConfigError, match="gamma_0 = -20"):
        make_scheduler("ancestral", make_schedule("uniform", -20.0, 5.0), 16)
    make_scheduler("ancestral", make_schedule("uniform", -12.0, 20.0), 1000)
