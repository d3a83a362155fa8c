"""The bound of `hldm.training.objectives` over a whole corpus, in bits a character, and how sure of it one may be.

Every document is read whole, its state carried from window to window, so how the text is laid out in lanes
and windows changes the random draws and nothing else. The sum pays for every byte and for every end of a
chunk and of a document: it bounds what a file compressed with the model would take. For the twin it is no
bound but the likelihood itself. Where a mixture predicts the latents, whose density is known, the bound can be made
tighter by as many draws as one likes (`importance_nats`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.evaluation.metrics import ratio_error
from hldm.evaluation.prompts import prompt_chunker
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import alpha_sigma
from hldm.model.likelihood import noisy_latents, read_chunks
from hldm.model.mixture import MixturePredictor
from hldm.model.prior import Prior, price_latents
from hldm.model.state import ContextState, DecoderState, EncoderState, Encoding
from hldm.text.bytes import count_characters
from hldm.text.corpus import Corpus
from hldm.text.windows import Batch, Windows, draw_normal

LANES, WINDOW_BYTES = 16, 512  # measured, configs/tiny.yaml on a CPU: 256 and 1024 bytes take longer
PASSES = 2  # independent estimates of the latent model's terms: the least that shows how far they differ


def held_out_windows(
    autoencoder: Autoencoder, corpus: Corpus, chunk_start: np.ndarray | None = None
) -> Windows:
    """A corpus laid out for reading whole documents in order, a few at a time.

    chunk_start: (t,) bool where its chunks start, if that is known already. The twin's, which change nothing for it,
    are TWIN_WORDS: costs are known by chunk, and its own are as long as its attention sees.
    """
    chunker = prompt_chunker(autoencoder)
    return Windows(
        corpus,
        chunker,
        lanes=LANES,
        window_bytes=max(WINDOW_BYTES, 2 * chunker.max_bytes),
        shuffle=False,
        chunk_start=chunk_start,
    )


class Bound(NamedTuple):
    """What a corpus costs under a model: nats of every document, by term, and the noise in their sum."""

    decoder: np.ndarray  # (documents,) bytes and ends, given the latents
    latent: np.ndarray  # (documents,) the diffusion term
    end: np.ndarray  # (documents,) KL(q(z_1) || N(0, I))
    variance: float  # nats^2 of the sum of all, from the draws of noise and noise levels alone
    characters: np.ndarray  # (documents,)
    by_chunk: np.ndarray  # (chunks,) nats of all three terms
    importance: np.ndarray | None = None  # (documents,) the bound of `importance_nats`, if it was asked for

    @property
    def nats(self) -> np.ndarray:
        """All three terms of every document. (documents,)"""
        return self.decoder + self.latent + self.end

    def bits_per_character(self) -> dict[str, float | None]:
        """The bound, its terms, and two standard errors that answer different questions.

        standard_error:      of this corpus' bits given the model: Monte Carlo noise, which more draws lower
        standard_error_text: how much another text of this size and kind would differ, from the spread over
                             documents (of a ratio, by linearisation); None for a single document
        importance:          the tighter bound, with the mixture in place of the prior; None if not asked for
        """
        characters = self.characters.sum()
        unit = characters * math.log(2)
        bits = {name: float(getattr(self, name).sum() / unit) for name in ("latent", "decoder", "end")}
        return {
            "bound": float(self.nats.sum() / unit),
            "standard_error": math.sqrt(self.variance) / unit,
            "standard_error_text": ratio_error(self.nats, self.characters * math.log(2)),
            **bits,
            "importance": None if self.importance is None else float(self.importance.sum() / unit),
        }


@torch.no_grad()
def evaluate_bound(
    autoencoder: Autoencoder,
    prior: Prior | None,
    windows: Windows,
    *,
    draws: int = 8,
    samples: int = 0,
    generator: torch.Generator,
) -> Bound:
    """Sum the three terms over a corpus; for the twin (no prior) the decoder's alone, which needs no draws.

    draws: noise levels a chunk, and latents that its decoder reads, half of them in each of two independent passes;
    levels are stratified within a pass because the integrand is steep near gamma_0. Their mean is the estimate; the
    variance of its sum is sum d^2 / 4 over chunks, d the difference between the passes. Chunks draw independently,
    so this has as many degrees of freedom as there are chunks, and unlike the spread within a pass it knows what
    stratification saves. A decoder that carries its state links the chunks after a draw to it: there d is
    summed over a lane's window first.
    samples: of `importance_nats`, 0 for none; only for a prior with a mixture and a decoder that carries no state.
    Raises ValueError for shuffled windows, models in training mode, or draws that two passes cannot share.
    """
    _check_bound(autoencoder, prior, windows, draws, samples)
    corpus, rows, device = windows.corpus, windows.lanes, next(autoencoder.parameters()).device
    nats = np.zeros((3, windows.chunks))  # decoder, latent, end of every chunk
    importance = np.zeros(windows.chunks)
    variance = 0.0
    reader = _Reader(autoencoder, prior, draws // PASSES, samples, generator)
    decoders = [autoencoder.decoder_state(rows, device) for _ in range(1 if prior is None else draws)]
    encoder = None if prior is None else autoencoder.encoder_state(rows, device)
    memory = None if prior is None else prior.initial_state(rows, device)
    state = _Carried(decoders, encoder, memory)
    for step in range(windows.windows_per_epoch):
        batch = windows.batch(step)
        is_chunk = batch.is_chunk  # (b n)
        chunk = batch.chunk_index[is_chunk].numpy()
        passes, tight, state = reader.read(batch.to(device), state)
        nats[:, chunk] = passes.mean(dim=0)[:, is_chunk].numpy()
        if tight is not None:
            importance[chunk] = tight[is_chunk].numpy()
        difference = (passes[0] - passes[-1]).sum(dim=0)  # (b n)
        if autoencoder.settings.carry_state:
            difference = difference.sum(dim=1)
        variance += float(difference.square().sum()) / 4

    if not np.isfinite(nats).all():
        raise ValueError("the model gives this text a cost that is not finite: train it again")
    document = np.searchsorted(corpus.offsets, np.flatnonzero(windows.chunk_start), side="right") - 1
    decoder, latent, end, tighter = (
        np.bincount(document, weights=term, minlength=len(corpus)) for term in (*nats, importance)
    )
    characters = [count_characters(document.tobytes()) for document in corpus]
    return Bound(
        decoder, latent, end, variance, np.array(characters), nats.sum(axis=0), tighter if samples else None
    )


def _check_bound(
    autoencoder: Autoencoder, prior: Prior | None, windows: Windows, draws: int, samples: int
) -> None:
    """Raise ValueError for what `evaluate_bound` cannot measure."""
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
        """Independent estimates of a window's terms (passes 3 b n), its `importance_nats` (b n), the state after it.

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
    """-log (1/K) sum_k p(x | z_k) p(z_k) / q(z_k | x) of each chunk, z_k from q: nats (b n).

    The importance-weighted bound (Burda et al., arXiv 1509.00519, equation 8). K = 1 is the usual one under the
    mixture; more draws make it tighter, up to the likelihood: what is left out then is the divergence between
    q(z | x), a normal of fixed width, and the posterior of the model that it stands for. Latents reach later
    chunks through the text alone, so the chunks' bounds add up.
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
    tight = math.log(samples) - torch.stack(ratios).logsumexp(dim=0)
    return tight * encoding.mask
