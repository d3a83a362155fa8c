"""The diffusion of one latent: noise schedule, targets, the bound's two latent terms, samplers.

Everything is written in gamma = -log SNR (VDM, arXiv 2107.00630): alpha^2 = sigmoid(-gamma) and
sigma^2 = sigmoid(gamma), so alpha^2 + sigma^2 = 1, from gamma_0 (the noisy latent the decoder reads) to
gamma_1 (nearly pure noise). Knows no network: a denoiser is a function (z, gamma) -> estimate of x0.
The samplers are diffusers' (DDIM 2010.02502, SDE-DPM-Solver++ 2211.01095).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor, nn

from hldm.config import ConfigError, DiffusionConfig

SchedulerName = Literal["ancestral", "ddim", "dpm"]
Scheduler: TypeAlias = DDIMScheduler | DPMSolverMultistepScheduler
# (z (b z), gamma (b), uniform (b)) -> how far a draw of x0 lies from its estimate, and the variance around that
Spread: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

BINS = 32  # measured on the toy of the tests: 16 follow a little worse, 64 take longer to see rare errors
UNIFORM_SHARE = 0.1  # no weight 1/p exceeds 10x the uniform one; raises E[(f/p)^2] by 1/0.9 at most
MEMORY = 0.99  # of one `update`: some 100 steps, thousands of draws a bin, yet short against any run


def alpha_sigma(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Scale of signal and of noise: sqrt(sigmoid(-gamma)), sqrt(sigmoid(gamma))."""
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


def diffuse(x0: Tensor, gamma: Tensor, noise: Tensor) -> Tensor:
    """z_gamma = alpha x0 + sigma noise. x0, noise: (... z); gamma: (...)."""
    alpha, sigma = alpha_sigma(gamma.unsqueeze(-1))
    return alpha * x0 + sigma * noise


def x0_from(prediction: Tensor, z: Tensor, gamma: Tensor) -> Tensor:
    """The estimate of x0 that a prediction of v = alpha noise - sigma x0 stands for (arXiv 2202.00512).

    prediction, z: (... z); gamma: (...), float32 at least.
    """
    alpha, sigma = alpha_sigma(gamma.unsqueeze(-1))
    return alpha * z - sigma * prediction


def bound_integrand(x0: Tensor, x0_hat: Tensor, gamma: Tensor) -> Tensor:
    """f(gamma) = 1/2 e^-gamma ||x0 - x0_hat||^2 in nats a latent (VDM, section 5.1).

    x0, x0_hat: (... z); gamma and result: (...). The latent term of the bound is the integral of f over
    [gamma_0, gamma_1] = E_u[f(gamma(u)) / density(gamma(u))] under any schedule.
    """
    return 0.5 * torch.exp(-gamma) * (x0 - x0_hat).to(gamma.dtype).square().sum(-1)


def end_term(mu: Tensor, gamma_1: float) -> Tensor:
    """KL(N(alpha_1 mu, sigma_1^2 I) || N(0, I)) in nats a latent: (... z) -> (...)."""
    alpha_square = 1 / (1 + math.exp(gamma_1))
    minus_log_sigma_square = math.log1p(math.exp(-gamma_1))
    return 0.5 * (alpha_square * (mu.square() - 1) + minus_log_sigma_square).sum(-1)


def stratified(draws: int, offsets: Tensor) -> Tensor:
    """(i + offset) / draws for i = 0..draws-1: evenly spread, each uniform (VDM, section 5.3).

    offsets: (...) in [0, 1), one a latent. Returns (... draws).
    """
    return (torch.arange(draws, device=offsets.device) + offsets.unsqueeze(-1)) / draws


class Schedule(nn.Module):
    """How gammas are drawn from [gamma_0, gamma_1]: a density, constant in each of BINS equal bins.

    The bound does not depend on the density p, the variance of its estimate f(gamma)/p(gamma) does:
    E[(f/p)^2] = integral of E[f^2 | gamma] / p, least under the constraint integral p = 1 where
    E[f^2 | gamma] / p^2 is constant: p = sqrt(E[f^2 | gamma]) up to scale. The schedule follows it in closed
    form from the squares it has observed; VDM (section 5.3) descends its gradient instead. At first p is uniform.
    """

    cdf: Tensor  # (BINS + 1) share of the draws below each border of the bins, 0 ... 1
    observed: Tensor  # (BINS 2) decayed sums of f^2 and of the number of values
    pending: Tensor  # (BINS 2) the sums since the last update

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.gamma_0, self.gamma_1 = config.gamma_0, config.gamma_1
        self.register_buffer("cdf", torch.linspace(0, 1, BINS + 1))
        self.register_buffer("observed", torch.zeros(BINS, 2))
        self.register_buffer("pending", torch.zeros(BINS, 2), persistent=False)

    def gamma(self, u: Tensor) -> Tensor:
        """The u-quantile of the density, increasing from gamma_0 at u = 0 to gamma_1 at u = 1; any shape."""
        cdf, borders = self.cdf.to(u.dtype), self._borders(u.dtype)
        k = torch.searchsorted(cdf[1:-1].contiguous(), u.contiguous(), right=True)
        # lerp, because it returns its ends exactly
        return torch.lerp(borders[k], borders[k + 1], (u - cdf[k]) / (cdf[k + 1] - cdf[k]))

    def density(self, gamma: Tensor) -> Tensor:
        """p(gamma) of gamma(u) with u uniform, so d gamma / d u = 1 / p. gamma of any shape, in the range."""
        return self.cdf.to(gamma.dtype).diff()[self._bin(gamma)] * (BINS / (self.gamma_1 - self.gamma_0))

    @torch.no_grad()
    def observe(self, gamma: Tensor, squared_error: Tensor) -> None:
        """Note what the denoiser finds hard, for `update`.

        gamma, squared_error = ||x0 - x0_hat||^2: the same shape, one entry a draw, padding left out.
        """
        if gamma.shape != squared_error.shape:
            raise ValueError(
                f"gamma and squared_error must share a shape, got {tuple(gamma.shape)} and "
                f"{tuple(squared_error.shape)}"
            )
        square = (0.5 * torch.exp(-gamma.float()) * squared_error.float()).square().flatten()
        is_finite = square.isfinite()  # an overflow must not stay for good
        entries = torch.stack([square.where(is_finite, 0), is_finite.float()], dim=-1).to(self.pending.dtype)
        self.pending.index_add_(0, self._bin(gamma).flatten(), entries)

    @torch.no_grad()
    def update(self, skipped: bool = False) -> None:
        """Follow what was observed since the last update, once an optimizer step.

        skipped: the step was not finite; forget what was observed.

        Every process must call it equally often: sums are joined over them, so the result is the same
        however the rows are split over processes and micro-batches.
        """
        if skipped:
            self.pending.zero_()
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.pending)
        self.observed.mul_(MEMORY).add_(self.pending)
        self.pending.zero_()
        self.cdf.copy_(self._best_cdf())

    def _best_cdf(self) -> Tensor:
        """Borders of the density proportional to the root mean square of f in each bin, partly uniform."""
        total, count = self.observed.unbind(-1)
        is_seen = count > 0
        root_mean_square = (total / count).sqrt().where(is_seen, 0)
        typical = root_mean_square.sum() / is_seen.sum().clamp(min=1)
        root_mean_square = root_mean_square.where(is_seen, typical)  # a bin not seen yet is an average one
        scale = root_mean_square.sum()
        uniform = torch.full_like(root_mean_square, 1 / BINS)
        mass = torch.where(scale > 0, root_mean_square / scale, uniform)
        cdf = F.pad(torch.lerp(mass, uniform, UNIFORM_SHARE).cumsum(0), (1, 0))
        return cdf / cdf[-1]

    def _borders(self, dtype: torch.dtype) -> Tensor:
        return torch.linspace(self.gamma_0, self.gamma_1, BINS + 1, dtype=dtype, device=self.cdf.device)

    def _bin(self, gamma: Tensor) -> Tensor:
        place = (gamma - self.gamma_0) / (self.gamma_1 - self.gamma_0) * BINS
        return place.long().clamp(0, BINS - 1)


def _table(schedule: Schedule, steps: int) -> list[float]:
    """diffusers' betas of a table with one entry a noise level: the schedule's quantiles, gamma_0 first."""
    gamma = schedule.gamma(torch.linspace(0, 1, steps + 1, device=schedule.cdf.device)).double().cpu()
    alpha_square = torch.sigmoid(-gamma)
    betas = 1 - alpha_square / F.pad(alpha_square[:-1], (1, 0), value=1.0)
    held = -torch.logit(torch.cumprod(1 - betas.float(), 0).double())
    # diffusers keeps float32 betas: below about gamma = -14, or with steps too fine, levels melt together
    if not ((held - gamma).abs() < 0.5 * gamma.diff().min()).all():
        raise ConfigError(
            f"diffusion.gamma_0 = {schedule.gamma_0:g} with generation.steps = {steps} needs more digits "
            "than a float32 noise table has; take fewer steps or a larger gamma_0"
        )
    return betas.tolist()


# diffusers' classes with every default that would touch an unbounded latent, or end at x0 instead of gamma_0, off.
_SDE = {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min", "timestep_spacing": "linspace"}
_DDIM = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading", "steps_offset": 1}
SCHEDULERS: dict[SchedulerName, tuple[type[Scheduler], dict[str, Any]]] = {
    # order 1 is the draw from q(z_s | z_t, x0 = x0_hat), VDM's ancestral sampler
    "ancestral": (DPMSolverMultistepScheduler, {"solver_order": 1, **_SDE}),
    "ddim": (DDIMScheduler, _DDIM),
    "dpm": (DPMSolverMultistepScheduler, {"solver_order": 2, **_SDE}),
}


def make_scheduler(name: SchedulerName, schedule: Schedule, steps: int) -> Scheduler:
    """diffusers' scheduler that visits gamma(1), gamma(1 - 1/steps), ..., gamma(0) of our schedule.

    Its table holds these levels and no others: DDIM steps by table // steps entries and drifts off any table that steps
    does not divide. It expects estimates of x0.
    Saved by `save_pretrained`, loaded by its class's `from_pretrained`; `scheduler_name` then says which
    of ours it is, and `config.num_train_timesteps - 1` is the number of steps.
    Raises ValueError for an unknown name or steps < 1, ConfigError for a schedule float32 cannot hold.
    """
    if steps < 1 or name not in SCHEDULERS:
        raise ValueError(f"a sampler is {', '.join(SCHEDULERS)}, of at least 1 step, got {name!r} of {steps}")
    cls, options = SCHEDULERS[name]
    table = _table(schedule, steps)
    scheduler = cls(num_train_timesteps=steps + 1, trained_betas=table, prediction_type="sample", **options)
    with warnings.catch_warnings():  # diffusers hands numpy 2 a tensor, which torch answers the old way
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        scheduler.set_timesteps(steps)
    return scheduler


def scheduler_name(class_name: str, solver_order: object) -> SchedulerName:
    """The name under which `make_scheduler` makes a scheduler of this class. Raises ValueError for any other."""
    for name, (cls, options) in SCHEDULERS.items():
        if class_name == cls.__name__ and options.get("solver_order", solver_order) == solver_order:
            return name
    raise ValueError(
        f"{class_name!r:.80} is not one of the schedulers of hldm, or of another order: {', '.join(SCHEDULERS)}"
    )


class Steps(NamedTuple):
    """A sampler written out: z <- w_0 z + w_1 x0_hat + w_2 (the x0_hat before) + w_3 noise, from gamma to gamma."""

    gammas: Tensor  # (s+1) gamma(1) to gamma(0)
    weights: Tensor  # (s 4)

    @property
    def draws(self) -> bool:
        """Whether steps add noise."""
        return bool(self.weights[:, 3].any())


@torch.no_grad()
def sampler_steps(name: SchedulerName, schedule: Schedule, steps: int) -> Steps:
    """Every step of a sampler, read off diffusers' by asking it about one basis vector after another.

    Its steps are linear in all that they are given: so what takes it a quarter of a millisecond each time can be known
    once. Raises as `make_scheduler`.
    """
    solver: Any = make_scheduler(name, schedule, steps)  # Any: diffusers' step methods differ in type
    gammas = schedule.gamma(torch.linspace(1, 0, steps + 1, device=schedule.cdf.device))
    z, now, before, noise = torch.eye(4)[:, None]  # each (1 4)
    weights = []
    drawn = {} if name == "ddim" else {"variance_noise": noise}
    for t in solver.timesteps[:steps]:
        after = solver.step(now, t, z, **drawn).prev_sample
        weights.append(torch.stack([(after * part).sum() for part in (z, now, before, noise)]))
        now, before = before, now  # the solver keeps its last estimate
    return Steps(gammas, torch.stack(weights).to(gammas.device))


def draw_numbers(
    plan: Steps,
    shape: tuple[int, int],
    generators: Sequence[torch.Generator],
    temperature: float,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """What a plan draws, each row from its own generator: a uniform number a step, then noise at the start and a step.

    Returns (s b) float64 in [0, 1) and (1 + s b z), temperature times standard normal; s is 0 where steps draw nothing.
    """
    draws = len(plan.weights) if plan.draws else 0
    drawn = [
        (
            torch.rand(draws, generator=g, device=g.device, dtype=torch.float64),
            torch.randn(1 + draws, shape[1], generator=g, device=g.device),
        )
        for g in generators
    ]
    uniform, noise = (torch.stack(numbers, dim=1).to(device) for numbers in zip(*drawn, strict=True))
    return uniform, temperature * noise


@torch.no_grad()
def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int],
    plan: Steps,
    generators: Sequence[torch.Generator],
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
    spread: Spread | None = None,
) -> Tensor:
    """Draw latents z_0 at gamma_0, as the decoder reads them, starting from N(0, I) as the bound charges.

    denoise: (z (b z), gamma (b,)) -> estimate of x0 (b z);  shape: (b, z);  plan: `sampler_steps`
    generators: one a row, so that a batch equals its rows;  temperature: scales all noise, first and later
    spread: steps then draw x0 instead of taking its mean, so few of them lose no variance; for plans that draw
    Returns (b z) float32. Raises ValueError unless there is one generator a row.
    """
    if len(generators) != shape[0]:
        raise ValueError(f"sample needs one generator a row, got {len(generators)} for {shape[0]} rows")
    uniform, noise = draw_numbers(plan, shape, generators, temperature, device)
    z = noise[0]
    before = torch.zeros_like(z)
    for step, (gamma, weights) in enumerate(
        zip(plan.gammas[:-1].to(device), plan.weights.tolist(), strict=True)
    ):
        gamma = gamma.expand(shape[0])
        x0_hat = denoise(z, gamma).to(z)
        after = weights[0] * z + weights[1] * x0_hat + weights[2] * before
        if spread is not None:
            offset, variance = spread(z, gamma, uniform[step])
            deviation = (weights[3] ** 2 + weights[1] ** 2 * variance).sqrt()
            after = after + weights[1] * offset + deviation * noise[1 + step]
        elif plan.draws:
            after = after + weights[3] * noise[1 + step]
        z, before = after, x0_hat
    return z
