"""The bound on -log p of a text, chunk by chunk: the one estimator behind evaluation and scores.

    -log p(x_c | x_<c) <= decoder nats given z_0  +  diffusion term  +  KL(q(z_1) || N(0, I))

Two independent passes estimate every chunk, so that their difference says how noisy the estimate is. For the twin
it is no bound but the likelihood itself. Where a mixture predicts the latents, whose density is known, the bound can
be made tighter by as many draws as one likes (`importance_nats`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import alpha_sigma
from hldm.model.likelihood import noisy_latents, read_chunks
from hldm.model.mixture import MixturePredictor
from hldm.model.prior import Prior, price_latents
from hldm.model.state import ContextState, DecoderState, EncoderState, Encoding
from hldm.runs.doing import reached
from hldm.text.windows import Batch, Windows, draw_normal

PASSES = 2  # independent estimates of the latent model's terms: the least that shows how far they differ


class ChunkBounds(NamedTuple):
    """What every chunk of a corpus costs, in nats, and what is known of the noise in it."""

    decoder: np.ndarray  # (chunks,) bytes and ends, given the latent
    latent: np.ndarray  # (chunks,) the diffusion term
    end: np.ndarray  # (chunks,) KL(q(z_1) || N(0, I))
    difference: np.ndarray  # (chunks,) of the first pass from the second
    group: np.ndarray  # (chunks,) int: chunks of one group share noise, others do not
    importance: np.ndarray | None = None  # (chunks,) the bound of `importance_nats`, if it was asked for
    importance_variance: np.ndarray | None = None  # (chunks,) of it, nats^2

    @property
    def nats(self) -> np.ndarray:
        """All three terms of every chunk. (chunks,)"""
        return self.decoder + self.latent + self.end


@torch.no_grad()
def bound_chunks(
    autoencoder: Autoencoder,
    prior: Prior | None,
    windows: Windows,
    *,
    draws: int = 8,
    samples: int = 0,
    generator: torch.Generator,
) -> ChunkBounds:
    """Estimate the three terms of every chunk; for the twin (no prior) the decoder's alone, which needs no draws.

    draws: noise levels a chunk, and latents that its decoder reads, half of them in each of two independent passes;
    levels are stratified within a pass because the integrand is steep near gamma_0. Their mean is the estimate; the
    variance of its sum over chunks is sum d^2 / 4, d the difference between the passes. Chunks draw independently,
    so this has as many degrees of freedom as there are chunks, and unlike the spread within a pass it includes
    what stratification saves. A decoder that carries its state makes later chunks depend on a draw: there d is to be
    summed over a stream's window first (`group`).
    samples: of `importance_nats`, 0 for none; only for a prior with a mixture and a decoder that carries no state.
    Raises ValueError for shuffled windows, models in training mode, draws that two passes cannot share, or a cost
    that is not finite.
    """
    _check(autoencoder, prior, windows, draws, samples)
    rows, device = windows.lanes, next(autoencoder.parameters()).device
    nats = np.zeros((3, windows.chunks))  # decoder, latent, end of every chunk
    tight = np.zeros((2, windows.chunks))  # importance, its variance
    difference = np.zeros(windows.chunks)
    group = np.arange(windows.chunks)
    reader = _Reader(autoencoder, prior, draws // PASSES, samples, generator)
    decoders = [autoencoder.decoder_state(rows, device) for _ in range(1 if prior is None else draws)]
    encoder = None if prior is None else autoencoder.encoder_state(rows, device)
    memory = None if prior is None else prior.initial_state(rows, device)
    state = _Carried(decoders, encoder, memory)
    for step in range(windows.windows_per_epoch):
        batch = windows.batch(step)
        is_chunk = batch.is_chunk  # (b n)
        chunk = batch.chunk_index[is_chunk].numpy()
        passes, weighted, state = reader.read(batch.to(device), state)
        nats[:, chunk] = passes.mean(dim=0)[:, is_chunk].numpy()
        difference[chunk] = (passes[0] - passes[-1]).sum(dim=0)[is_chunk].numpy()
        if weighted is not None:
            tight[:, chunk] = weighted[:, is_chunk].numpy()
        if autoencoder.settings.carry_state:
            group[chunk] = step * rows + is_chunk.nonzero()[:, 0].numpy()
        reached(step + 1, windows.windows_per_epoch)
    if not np.isfinite(nats).all():
        raise ValueError("the model gives this text a cost that is not finite: train it again")
    decoder, latent, end = nats
    importance, its_variance = tight if samples else (None, None)
    return ChunkBounds(decoder, latent, end, difference, group, importance, its_variance)


def _check(autoencoder: Autoencoder, prior: Prior | None, windows: Windows, draws: int, samples: int) -> None:
    """Raise ValueError for what `bound_chunks` cannot measure."""
    if windows.shuffle:
        raise ValueError("the bound is summed over whole documents: pass Windows(..., shuffle=False)")
    if autoencoder.training or (prior is not None and prior.training):
        raise ValueError("the bound is a property of a finished model: call .eval() on it first")
    if draws < PASSES or draws % PASSES:
        raise ValueError(f"draws must be even, half for each of two passes, got {draws}")
    if (autoencoder.latent_dim > 0) != (prior is not None):
        raise ValueError("a prior belongs to an autoencoder with latents, and to no other")
    has_mixture = prior is not None and prior.mixture is not None
    if samples and (not has_mixture or autoencoder.settings.carry_state):
        raise ValueError(
            "importance weights need the latents' density and chunks that are independent given the text: "
            "autoencoder.components above 0 and carry_state false"
        )


class _Carried(NamedTuple):
    """State between windows."""

    decoders: Sequence[DecoderState]  # of each draw of a latent, those of the first pass first
    encoder: EncoderState | None  # None for the twin
    memory: ContextState | None  # of the contextualiser; None for the twin


class _Reader(NamedTuple):
    """The models, and how often they estimate a chunk's terms."""

    autoencoder: Autoencoder
    prior: Prior | None
    draws: int  # a pass
    samples: int
    generator: torch.Generator

    def read(self, batch: Batch, state: _Carried) -> tuple[Tensor, Tensor | None, _Carried]:
        """Independent estimates of a window's terms (passes 3 b n), its `importance_nats` (2 b n), the state after it.

        Terms: decoder, latent, end of every chunk.
        """
        autoencoder, prior, draws, samples, generator = self
        if prior is None:
            reading, decoder = read_chunks(autoencoder, batch, None, state.decoders[0])
            none = torch.zeros_like(reading.nats)
            terms = torch.stack([reading.nats, none, none])[None]
            return terms.double().cpu(), None, state._replace(decoders=[decoder])
        assert state.encoder is not None and state.memory is not None
        encoding, encoder = autoencoder.encode(batch, state.encoder)
        context, memory = prior.contextualiser(
            encoding.latents, encoding.mask, encoding.doc_start, state.memory, encoding.after
        )
        gamma_0 = prior.diffusion.gamma_0
        passes, decoders = [], []
        for first in range(0, PASSES * draws, draws):
            paid = price_latents(prior, encoding, context, batch, generator, draws)
            nats = torch.zeros_like(paid.latent)
            for before in state.decoders[first : first + draws]:
                z_0 = noisy_latents(encoding, gamma_0, batch, generator)
                reading, decoder = read_chunks(autoencoder, batch, z_0, before, encoding)
                nats += reading.nats / draws
                decoders.append(decoder)
            passes.append(torch.stack([nats, paid.latent, paid.end]))
        tight = None
        if samples and prior.mixture is not None:
            tight = importance_nats(
                autoencoder, prior.mixture, encoding, batch, decoders[0], gamma_0, samples, generator
            ).cpu()
        return torch.stack(passes).double().cpu(), tight, _Carried(decoders, encoder, memory)


@torch.no_grad()
def importance_nats(
    autoencoder: Autoencoder,
    mixture: MixturePredictor,
    encoding: Encoding,
    batch: Batch,
    decoder: DecoderState,
    gamma_0: float,
    samples: int,
    generator: torch.Generator,
) -> Tensor:
    """-log (1/K) sum_k p(x | z_k) p(z_k) / q(z_k | x) of each chunk, z_k from q: nats, and their variance (2 b n).

    The importance-weighted bound (Burda et al., arXiv 1509.00519, equation 8). K = 1 is the usual one under the
    mixture; more draws make it tighter, up to the likelihood: what is left out then is the divergence between
    q(z | x), a normal of fixed width, and the posterior of the model that it stands for. Latents reach later
    chunks through the text alone, so the chunks' bounds add up. The variance is that of a mean of K ratios r,
    to first order sum (r_k / mean - 1)^2 / (K (K - 1)); infinite for K = 1, which shows no spread.
    """
    alpha, sigma = alpha_sigma(torch.tensor(gamma_0, device=encoding.latents.device))
    log_weights = mixture.log_weights(encoding.before)
    gamma = encoding.latents.new_full(encoding.latents.shape[:-1], gamma_0)
    ratios = []
    for _ in range(samples):
        noise = draw_normal(batch, encoding.latents.shape[1:], generator)
        z_0 = alpha * encoding.latents + sigma * noise
        reading, _ = read_chunks(autoencoder, batch, z_0, decoder, encoding)
        log_p = mixture.joint(z_0, gamma, log_weights).logsumexp(dim=-1)
        log_q = (-0.5 * noise.square() - sigma.log() - 0.5 * math.log(2 * math.pi)).sum(dim=-1)
        ratios.append((log_p - log_q - reading.nats).double())
    log_ratios = torch.stack(ratios)  # (k b n)
    log_mean = log_ratios.logsumexp(dim=0) - math.log(samples)
    spread = ((log_ratios - log_mean).exp() - 1).square().sum(dim=0)
    variance = spread / (samples * (samples - 1)) if samples > 1 else torch.full_like(spread, math.inf)
    return torch.stack([-log_mean, variance]).masked_fill(~encoding.mask, 0)
