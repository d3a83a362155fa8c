"""What a sampler of few steps costs, how far its latents are from true ones, and what a latent tells the decoder.

The bound that is reported belongs to infinitely many steps. A sampler of S steps with kernels p(z_{i-1} | z_i) has a
bound of its own,

    L_S = sum_{i=1..S} E[log q(z_{i-1} | z_i, mu) - log p(z_{i-1} | z_i)] + KL(q(z_1) || N(0, I))

(VDM, arXiv 2107.00630, equation 11). Ancestral kernels are q(z_{i-1} | z_i, x0) with a draw of x0 from the mixture,
which the network shifts: a mixture in closed form; without a mixture x0 is the estimate. S = 0 is a draw from the
mixture, whose cost is in closed form, too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hldm.config import GenerationConfig, changed
from hldm.evaluation.prompts import choose_prompts, prompt_chunker
from hldm.evaluation.reconstruction import ENOUGH_CHUNKS, read_windows
from hldm.evaluation.worth import Clusters, clusters_of, paired_worth
from hldm.generation.chunk import write_chunks
from hldm.generation.writer import LatentWriter, row_generators
from hldm.model.autoencoder import Autoencoder
from hldm.model.contextualiser import Context
from hldm.model.denoiser import Conditioning
from hldm.model.diffusion import (
    Spread,
    alpha_sigma,
    bound_integrand,
    diffuse,
    end_term,
    sample,
    sampler_steps,
    stratified,
)
from hldm.model.likelihood import noisy_latents, read_chunks
from hldm.model.mixture import MixturePredictor
from hldm.model.prior import Prior
from hldm.model.state import Encoding, pick_rows
from hldm.text.bytes import END_OF_CHUNK
from hldm.text.windows import Batch, Windows, draw_normal, draw_uniform, window_of

STEPS = (0, 1, 2, 4, 8, 16, 64)
LEVELS = 64  # noise levels of the limit, a chunk
TOGETHER = 4  # at once: 2 and 16 take longer (measured, configs/small.yaml, one core)
MOST_STEPS = 8  # of a sampler, drawn a chunk: more of them make L_64 slow and hardly more exact
SURE = 0.9  # probability of the likeliest symbol from which the decoder counts as sure of it
PLACES, WRITINGS = 512, 64  # latents that are written, and how often each: an error of 1.5 points
PLACES_AT_ONCE = 32


def read_contexts(
    autoencoder: Autoencoder, prior: Prior, windows: Windows
) -> Iterator[tuple[Batch, Encoding, Context]]:
    """Every window, what the encoder makes of it, and the context of each of its chunks."""
    memory = prior.initial_state(windows.lanes, next(autoencoder.parameters()).device)
    for batch, encoding in read_windows(autoencoder, windows):
        context, memory = prior.contextualiser(
            encoding.latents, encoding.mask, encoding.doc_start, memory, encoding.after
        )
        yield batch, encoding, context.first(batch.chunks)


def sampled_latents(prior: Prior, context: Context, steps: int, generator: torch.Generator) -> Tensor:
    """z_0 (b n z) of chunks with these contexts, by `steps` ancestral steps; 0: a draw from the mixture."""
    b, n = context.summary.shape[:2]
    conditioning, rows, z = prior.condition(context), b * n, prior.latent_dim
    seeds = torch.randint(2**32, (rows,), generator=generator).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if not steps:
        if prior.mixture is None or conditioning.log_weights is None:
            raise ValueError("this prior has no mixture to draw from: take 1 step or more")
        weights = conditioning.log_weights.reshape(rows, -1)
        return prior.mixture.sample(prior.diffusion.gamma_0, weights, generators).view(b, n, z)

    def denoise(state: Tensor, gamma: Tensor) -> Tensor:
        return prior.denoise(state.view(b, n, 1, z), gamma.view(b, n, 1), conditioning).view(rows, z)

    spread: Spread | None = None
    if conditioning.log_weights is not None:
        flat = conditioning._replace(log_weights=conditioning.log_weights.view(rows, 1, 1, -1))

        def spread(state: Tensor, gamma: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return prior.spread(state, gamma, flat, u)

    plan = sampler_steps("ancestral", prior.schedule, steps)
    device = context.summary.device
    return sample(denoise, (rows, z), plan, generators, device=device, spread=spread).view(b, n, z)


# ---- bounds of finite samplers


def _limit(
    prior: Prior, mu: Tensor, conditioning: Conditioning, batch: Batch, generator: torch.Generator
) -> Tensor:
    """The latent terms of the bound of infinitely many steps, one draw for each of LEVELS strata: nats (b n)."""
    b, n, z = mu.shape
    u = stratified(LEVELS, draw_uniform(batch, (n,), generator))
    noise = draw_normal(batch, (n, LEVELS, z), generator)
    terms = []
    for first in range(0, LEVELS, TOGETHER):
        part = slice(first, first + TOGETHER)
        gamma = prior.schedule.gamma(u[:, :, part])
        x0 = mu[:, :, None].expand(b, n, TOGETHER, z)
        x0_hat = prior.denoise(diffuse(x0, gamma, noise[:, :, part]), gamma, conditioning)
        terms.append(bound_integrand(x0, x0_hat, gamma) / prior.schedule.density(gamma))
    return torch.cat(terms, dim=-1).mean(dim=-1) + end_term(mu, prior.diffusion.gamma_1)


def _cost_of_steps(
    prior: Prior, mu: Tensor, conditioning: Conditioning, batch: Batch, steps: int, generator: torch.Generator
) -> Tensor:
    """L_S of S ancestral steps, of which MOST_STEPS are drawn, one from each stretch of as many: nats (b n)."""
    plan = sampler_steps("ancestral", prior.schedule, steps)
    b, n, z = mu.shape
    total = end_term(mu, prior.diffusion.gamma_1)
    drawn = min(steps, MOST_STEPS)
    for part in range(drawn):
        u = draw_uniform(batch, (n,), generator)
        step = ((part + u) * steps / drawn).long().clamp(max=steps - 1)  # (b n)
        gamma, weights = plan.gammas[step], plan.weights[step]
        noise = draw_normal(batch, (n, 2, z), generator)
        above = diffuse(mu, gamma, noise[:, :, 0])
        of_z, of_x0, _, deviation = (weight[..., None] for weight in weights.unbind(-1))
        below = of_z * above + of_x0 * mu + deviation * noise[:, :, 1]
        log_q = _log_normal(noise[:, :, 1], torch.ones_like(deviation)) - z * deviation[..., 0].log()
        x0_hat = prior.denoise(above[:, :, None], gamma[:, :, None], conditioning)[:, :, 0]
        from_estimate = below - of_z * above - of_x0 * x0_hat
        if prior.mixture is None or conditioning.log_weights is None:
            log_p = _log_normal(from_estimate, deviation.square().expand_as(mu))
        else:
            log_p = _log_mixture(
                prior.mixture,
                from_estimate,
                above,
                gamma,
                conditioning.log_weights[:, :, 0],
                of_x0,
                deviation,
            )
        total = total + (log_q - log_p) * steps / drawn
    return total


def _log_normal(x: Tensor, variance: Tensor) -> Tensor:
    """log N(x; 0, diag variance). (... z), (... z) -> (...)."""
    return -0.5 * (x.square() / variance + variance.log() + math.log(2 * math.pi)).sum(dim=-1)


def _log_mixture(
    mixture: MixturePredictor,
    from_estimate: Tensor,
    z: Tensor,
    gamma: Tensor,
    log_weights: Tensor,
    of_x0: Tensor,
    deviation: Tensor,
) -> Tensor:
    """log p of a step whose x0 is a draw from the mixture given z, shifted so that its mean is the estimate: (b n).

    from_estimate: (b n z) from where the step would lead with the estimate itself;  of_x0, deviation: (b n 1)
    """
    joint = mixture.joint(z, gamma, log_weights)
    alpha, sigma = (x.unsqueeze(-1) for x in alpha_sigma(gamma))
    square = (2 * mixture.log_deviation).exp()
    left = sigma.square() / (
        alpha.square() * square + sigma.square()
    )  # what a component leaves of a prototype
    variance = of_x0.square() * left * square + deviation.square()
    y = from_estimate + of_x0 * left * (joint.softmax(dim=-1) @ mixture.prototypes)
    scale = of_x0 * left  # y of component k ~ N(scale m_k, variance)
    cross = (scale * y / variance) @ mixture.prototypes.T
    own = (scale.square() / variance) @ mixture.prototypes.square().T
    by_component = joint.log_softmax(dim=-1) + cross - 0.5 * own
    return by_component.logsumexp(dim=-1) + _log_normal(y, variance)


@torch.no_grad()
def finite_steps(
    autoencoder: Autoencoder, prior: Prior, windows: Windows, generator: torch.Generator
) -> list[dict[str, Any]]:
    """L_S for S of STEPS, and how far it lies above infinitely many steps: bits a character, paired errors."""
    nats = {steps: np.zeros(windows.chunks) for steps in STEPS if steps or prior.mixture is not None}
    infinite = np.zeros(windows.chunks)
    for batch, encoding, context in read_contexts(autoencoder, prior, windows):
        mu, conditioning, mask = encoding.latents, prior.condition(context), batch.is_chunk
        chunk = batch.chunk_index[mask].cpu().numpy()
        infinite[chunk] = _limit(prior, mu, conditioning, batch, generator)[mask].double().cpu().numpy()
        for steps, found in nats.items():
            if steps:
                cost = _cost_of_steps(prior, mu, conditioning, batch, steps, generator)
            else:
                assert prior.mixture is not None and conditioning.log_weights is not None
                noise = draw_normal(batch, mu.shape[1:], generator)
                gamma_0 = prior.diffusion.gamma_0
                cost = prior.mixture.rate(mu, noise, gamma_0, conditioning.log_weights[:, :, 0])
            found[chunk] = cost[mask].double().cpu().numpy()
    clusters = clusters_of(windows)
    return [_row_of_steps(clusters, steps, cost, infinite) for steps, cost in nats.items()]


def _row_of_steps(clusters: Clusters, steps: int, cost: np.ndarray, infinite: np.ndarray) -> dict[str, Any]:
    sums, limit = clusters.sums(cost), clusters.sums(infinite)
    over = paired_worth(sums, limit, clusters.characters)
    total = paired_worth(sums, np.zeros_like(sums), clusters.characters)
    return {"steps": steps, "bits": total.bits, "over": over.bits, "standard_error": over.standard_error}


@torch.no_grad()
def deviations(
    autoencoder: Autoencoder, prior: Prior, windows: Windows, steps: Sequence[int], generator: torch.Generator
) -> dict[str, list[float]]:
    """Standard deviation of sampled latents z_0 by that of true ones, a number a dimension, by number of steps.

    Given the true text before each, on the first ENOUGH_CHUNKS chunks.
    """
    true: list[Tensor] = []
    drawn: dict[int, list[Tensor]] = {count: [] for count in steps if count or prior.mixture is not None}
    for batch, encoding, context in read_contexts(autoencoder, prior, windows):
        mask = encoding.mask
        true.append(noisy_latents(encoding, prior.diffusion.gamma_0, batch, generator)[mask])
        for count, found in drawn.items():
            found.append(sampled_latents(prior, context, count, generator)[mask])
        if sum(map(len, true)) >= ENOUGH_CHUNKS:
            break
    deviation = torch.cat(true).std(dim=0)
    return {str(count): (torch.cat(found).std(dim=0) / deviation).tolist() for count, found in drawn.items()}


# ---- what the decoder makes of a latent


@torch.no_grad()
def share_sure(
    autoencoder: Autoencoder, prior: Prior | None, windows: Windows, generator: torch.Generator
) -> float:
    """Share of bytes to which the decoder gives more than SURE to one symbol, given z_0; the twin without."""
    decoder = autoencoder.decoder_state(windows.lanes, next(autoencoder.parameters()).device)
    sure = total = 0

    def count(batch: Batch, latent: Tensor | None, encoding: Encoding | None) -> None:
        nonlocal decoder, sure, total
        reading, decoder = read_chunks(autoencoder, batch, latent, decoder, encoding)
        is_byte = reading.events.mask & (reading.events.target < END_OF_CHUNK)
        likeliest = reading.logits[is_byte].float().softmax(dim=-1).amax(dim=-1)
        sure, total = sure + int((likeliest > SURE).sum()), total + len(likeliest)

    if prior is None:
        device = next(autoencoder.parameters()).device
        for step in range(windows.windows_per_epoch):
            count(windows.batch(step).to(device), None, None)
    else:
        for batch, encoding in read_windows(autoencoder, windows):
            z_0 = noisy_latents(encoding, prior.diffusion.gamma_0, batch, generator)
            count(batch, z_0, encoding)
    return sure / total


@torch.no_grad()
def agreement(
    autoencoder: Autoencoder, prior: Prior, windows: Windows, settings: GenerationConfig, seed: int
) -> dict[str, float | None]:
    """How often two writings of one latent are the same bytes: after the same text, with other draws of the decoder.

    Of PLACES true latents z_0, WRITINGS writings each, at the temperature that the model writes with.
    share: of all pairs;  standard_error: over latents;  places: latents. share is None where there is no place.
    """
    generator = torch.Generator().manual_seed(seed)
    chunker = prompt_chunker(autoencoder)
    texts, following = [], []
    for prompt in choose_prompts(windows.corpus, chunker, PLACES):
        text = prompt.text + prompt.continuation.encode()
        borders = np.flatnonzero(chunker.chunk_start(np.frombuffer(text, dtype=np.uint8)))
        borders = borders[borders >= len(prompt.text)]
        if len(borders) > 1:  # the next chunk is whole
            texts.append(text[: borders[0]])
            following.append(text[borders[0] : borders[1]])
    if not texts:
        return {"share": None, "standard_error": None, "places": 0}
    at_once = changed(settings, steps=0 if prior.mixture is not None else 1, guidance=1.0)
    writer = LatentWriter(autoencoder, prior, texts, at_once, row_generators(seed, len(texts)))
    device = writer.device
    starts = [np.arange(len(text)) == 0 for text in following]
    window = window_of(following, starts, [False] * len(texts), device)
    encoding, _ = autoencoder.encode(window, writer.encoder)
    noise = torch.randn(len(texts), prior.latent_dim, generator=generator).to(device)
    z_0 = diffuse(
        encoding.latents[:, 0], torch.full((len(texts),), prior.diffusion.gamma_0, device=device), noise
    )
    shares: list[float] = []
    for first in range(0, len(texts), PLACES_AT_ONCE):
        places = torch.arange(first, min(first + PLACES_AT_ONCE, len(texts)), device=device)
        index = places.repeat_interleave(WRITINGS)
        written = write_chunks(
            autoencoder,
            z_0[index],
            pick_rows(writer.encoder, index),
            pick_rows(writer.decoder, index),
            [False] * len(index),
            at_once,
            row_generators(seed + WRITINGS * first, len(index)),
        )
        for row in range(0, len(index), WRITINGS):
            counts = Counter(written.pieces[row : row + WRITINGS]).values()
            shares.append(sum(k * (k - 1) for k in counts) / (WRITINGS * (WRITINGS - 1)))
    error = float(np.std(shares, ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else None
    return {"share": float(np.mean(shares)), "standard_error": error, "places": len(shares)}
