"""What each stage minimises, and the bound that both halves meet in.

    -log p(x_c | x_<c)  <=  E[-log p(x_c | z_0)]  +  diffusion term  +  KL(q(z_1) || N(0, I))
                            decoder                 latent              end

(VDM, arXiv 2107.00630, per chunk c with its end symbol.) An objective is a module: `forward(batch,
carry, generator, progress)` returns a loss normalised by the bytes of the *global* batch, so gradients
add up to the same whatever the ranks and micro-batches; `hldm.training.trainer` knows no more than that.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hldm.config import AutoencoderConfig
from hldm.model.autoencoder import Autoencoder, DecoderState, EncoderState, Encoding
from hldm.model.contextualiser import Context, ContextState
from hldm.model.diffusion import diffuse, end_term, stratified
from hldm.model.mixture import MixturePredictor
from hldm.model.prior import Prior
from hldm.model.state import map_carry
from hldm.text.events import positions, sum_by_chunk, symbol_nats
from hldm.text.windows import Batch


class Carry(NamedTuple):
    """State of every lane between windows; None for parts the objective lacks."""

    encoder: EncoderState | None = None
    decoder: DecoderState | None = None
    context: ContextState | None = None


class Step(NamedTuple):
    """One forward pass over (part of) a batch."""

    loss: Tensor  # scalar: nats per byte of the global batch
    nats: dict[str, Tensor]  # sums over this part, detached, by name
    characters: Tensor  # in this part
    carry: Carry  # detached


def draw_normal(batch: Batch, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise (b *shape): drawn for the global batch, then this part's rows."""
    return _own_rows(batch, torch.randn(batch.total_rows, *shape, generator=generator))


def draw_uniform(batch: Batch, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform noise in [0, 1), by the same rule."""
    return _own_rows(batch, torch.rand(batch.total_rows, *shape, generator=generator))


def _own_rows(batch: Batch, drawn: Tensor) -> Tensor:
    rows = slice(batch.first_row, batch.first_row + batch.bytes.shape[0])
    return drawn[rows].to(batch.bytes.device)


def count_characters(batch: Batch) -> Tensor:
    """UTF-8 characters in a batch: its bytes that do not continue one."""
    real = torch.arange(batch.bytes.shape[1], device=batch.bytes.device) < batch.length[:, None]
    return ((batch.bytes & 0xC0 != 0x80) & real).sum()


class Reading(NamedTuple):
    """What the decoder made of a window."""

    nats: Tensor  # (b n) -log p of each chunk's bytes and end
    symbol_nats: Tensor  # (b t') of each event
    logits: Tensor  # (b t' v) of its symbol
    target: Tensor  # (b t') that symbol
    correct: Tensor  # (b t') bool: the likeliest symbol is the right one
    mask: Tensor  # (b t') bool: real events
    chunk: Tensor  # (b t') chunk of each event


def read_chunks(
    autoencoder: Autoencoder,
    batch: Batch,
    latent: Tensor | None,
    state: DecoderState,
    encoding: Encoding | None = None,
) -> tuple[Reading, DecoderState]:
    """Score a window's bytes given its latents z_0 (b n z), and what the encoder made of them."""
    events = autoencoder.events(
        batch.bytes, batch.length, batch.doc_start, batch.doc_end, batch.chunk_start, state
    )
    logits, griffin = autoencoder.decode(
        events.symbol,
        latent,
        events.chunk,
        events.doc_start,
        events.unit_start,
        state.griffin,
        events.length,
        told=None if encoding is None else autoencoder.tell(events, encoding),
    )
    nats = symbol_nats(logits, events)
    by_chunk = sum_by_chunk(nats, events, batch.chunk_index.shape[1])
    correct = (logits.argmax(dim=-1) == events.target) & events.mask
    reading = Reading(by_chunk, nats, logits, events.target, correct, events.mask, events.chunk)
    return reading, DecoderState(griffin, events.last)


def read_latents(
    autoencoder: Autoencoder, batch: Batch, state: EncoderState
) -> tuple[Encoding, EncoderState]:
    """mu of each chunk of a window."""
    return autoencoder.encode(
        batch.bytes,
        batch.length,
        batch.doc_start,
        batch.chunk_start,
        state,
        chunks=batch.chunk_index.shape[1],
    )


class Payment(NamedTuple):
    """What the latents of a window cost under a prior, nats per chunk."""

    latent: Tensor  # (b n)
    end: Tensor  # (b n)


def price_latents(
    prior: Prior,
    encoding: Encoding,
    context: Context,
    batch: Batch,
    generator: torch.Generator,
    draws: int | None = None,
    hide: bool = False,
) -> Payment:
    """The latent and end terms of the bound, from `draws` stratified noise levels a chunk.

    hide: training's context dropout and self-conditioning, by their configured shares.
    """
    settings = prior.settings
    b, n, z = encoding.latents.shape
    m = draws or settings.draws
    u = stratified(m, draw_uniform(batch, (n,), generator))
    noise = draw_normal(batch, (n, m, z), generator)
    context = context.first(n)
    self_condition = settings.self_conditioning > 0
    if hide:
        if settings.context_dropout:
            hidden = draw_uniform(batch, (n,), generator) < settings.context_dropout
            context = prior.hide(context, hidden)
        coin = torch.rand((), generator=generator)
        self_condition = bool(coin < settings.self_conditioning)
    latent = prior.latent_term(encoding.latents, encoding.mask, context, u, noise, self_condition)
    end = end_term(encoding.latents, prior.diffusion.gamma_1)
    return Payment(latent * encoding.mask, end * encoding.mask)


def noisy_latents(
    autoencoder: Autoencoder, encoding: Encoding, gamma_0: float, batch: Batch, generator: torch.Generator
) -> Tensor:
    """z_0 = alpha_0 mu + sigma_0 eps, what the decoder reads. (b n z)."""
    noise = draw_normal(batch, encoding.latents.shape[1:], generator)
    gamma = encoding.latents.new_full(encoding.latents.shape[:-1], gamma_0)
    return diffuse(encoding.latents, gamma, noise)


def rate_weight(settings: AutoencoderConfig, progress: float) -> float:
    """What a nat of the rate weighs against one of the decoder: rate_weight, in the end 1.

    Below 1 latents are cheap, and an encoder that has yet to learn uses them; the bound that is reported
    asks the full price. Linear over the last rate_anneal of the progress.
    """
    if not settings.rate_anneal:
        return settings.rate_weight
    done = min(max((progress - 1) / settings.rate_anneal + 1, 0.0), 1.0)
    return settings.rate_weight + done * (1 - settings.rate_weight)


class AutoencoderObjective(nn.Module):
    """Stage one: reconstruction from noisy latents plus what they cost (or the twin: plain bytes)."""

    def __init__(self, autoencoder: Autoencoder, settings: AutoencoderConfig, gamma_0: float):
        """gamma_0: the noise that the decoder reads through."""
        super().__init__()
        self.autoencoder, self.settings, self.gamma_0 = autoencoder, settings, gamma_0
        self.mixture: MixturePredictor | None = None  # what prices the latents; stage two starts from it
        if autoencoder.latent_dim and settings.components:
            self.mixture = MixturePredictor(settings.known_width, autoencoder.latent_dim, settings.components)

    def initial_carry(self, rows: int, device: torch.device) -> Carry:
        """State before the first window."""
        latent = self.autoencoder.latent_dim > 0
        return Carry(
            self.autoencoder.encoder_state(rows, device) if latent else None,
            self.autoencoder.decoder_state(rows, device),
        )

    def end_step(self, skipped: bool) -> None:
        """Fold the step's statistics into the normaliser; forget them when it was not finite."""
        if self.autoencoder.latent_dim:
            self.autoencoder.normaliser.update(skipped)

    def forward(self, batch: Batch, carry: Carry, generator: torch.Generator, progress: float) -> Step:
        """Loss of one window."""
        autoencoder, settings = self.autoencoder, self.settings
        encoder, z_0, encoding = carry.encoder, None, None
        rates: dict[str, Tensor] = {}
        if encoder is not None:
            encoding, encoder = read_latents(autoencoder, batch, encoder)
            z_0 = noisy_latents(autoencoder, encoding, self.gamma_0, batch, generator)
            if self.mixture is not None:
                noise = draw_normal(batch, encoding.latents.shape[1:], generator)
                weights = self.mixture.log_weights(encoding.before)
                nats = self.mixture.rate(encoding.latents, noise, self.gamma_0, weights)
                rates = {"latent": (nats * encoding.mask).sum()}
        assert carry.decoder is not None
        reading, decoder = read_chunks(autoencoder, batch, z_0, carry.decoder, encoding)
        paid_for = {"decoder": reading.nats.sum(), **rates}
        loss = paid_for["decoder"] + rate_weight(settings, progress) * sum(rates.values())
        if encoding is not None:
            loss = loss + (autoencoder.normaliser.hold(encoding.latents) * encoding.mask).sum()
        return Step(
            loss / batch.total_bytes,
            {name: value.detach() for name, value in paid_for.items()},
            count_characters(batch),
            map_carry(torch.detach, Carry(encoder, decoder)),
        )


class CachedLatents:
    """mu of every chunk of a corpus, and what a prior reads beside it, on disk; copies of a model share it."""

    def __init__(self, latents: np.ndarray):
        self.latents = latents  # (chunks z) or (chunks z+d) float32, memory-mapped

    def __deepcopy__(self, memo: dict) -> CachedLatents:
        return self

    def of(self, chunk: Tensor, latent_dim: int) -> tuple[Tensor, Tensor]:
        """mu (b n z) and features (b n d) of chunks by their number in the corpus (b n), on its device."""
        row = torch.from_numpy(self.latents[chunk.cpu().numpy()]).to(chunk.device)
        return row[..., :latent_dim], row[..., latent_dim:]


class PriorObjective(nn.Module):
    """Stage two: the latent terms of the bound; in the joint last phase, all of them.

    The autoencoder is frozen until then. `latents`: cached mu of every chunk of the corpus, or None.
    """

    def __init__(
        self, prior: Prior, autoencoder: Autoencoder, joint: float, latents: CachedLatents | None = None
    ):
        super().__init__()
        self.prior, self.autoencoder, self.joint, self.latents = prior, autoencoder, joint, latents
        if joint and latents is not None:
            raise ValueError("a joint phase changes the latents: it cannot read them from a cache")
        if not joint:
            autoencoder.requires_grad_(False)

    def train(self, mode: bool = True) -> PriorObjective:
        """Training mode for the prior; the autoencoder stays as it will be used."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def initial_carry(self, rows: int, device: torch.device) -> Carry:
        """State before the first window."""
        return Carry(
            self.autoencoder.encoder_state(rows, device) if self.latents is None else None,
            self.autoencoder.decoder_state(rows, device) if self.joint else None,
            self.prior.initial_state(rows, device),
        )

    def end_step(self, skipped: bool) -> None:
        """Fold the step's statistics into the schedule; forget them when it was not finite."""
        self.prior.schedule.update(skipped)

    def _latents(
        self, batch: Batch, encoder: EncoderState | None, learn: bool
    ) -> tuple[Encoding, EncoderState | None]:
        if encoder is None:
            assert self.latents is not None
            mask = batch.chunk_index >= 0
            latents, after = self.latents.of(batch.chunk_index.clamp(min=0), self.prior.latent_dim)
            doc_start = batch.doc_start.gather(1, positions(batch.chunk_start, mask.shape[1])) & mask
            # no decoder reads along with a cache, so nobody asks for what comes before the chunks
            none = after[..., :0]
            return Encoding(latents * mask[..., None], mask, doc_start, after, none, none), None
        with torch.set_grad_enabled(learn):
            return read_latents(self.autoencoder, batch, encoder)

    def forward(self, batch: Batch, carry: Carry, generator: torch.Generator, progress: float) -> Step:
        """Loss of one window."""
        jointly = self.joint > 0 and progress >= 1 - self.joint
        encoding, encoder = self._latents(batch, carry.encoder, jointly)
        context, context_state = self.prior.contextualiser(
            encoding.latents, encoding.mask, encoding.doc_start, carry.context, encoding.after
        )
        paid = price_latents(self.prior, encoding, context, batch, generator, hide=True)
        nats = {"latent": paid.latent.sum(), "end": paid.end.sum()}
        decoder = carry.decoder
        # before the joint phase the decoder only reads along, and only if it carries a state
        if decoder is not None and (jointly or self.autoencoder.settings.carry_state):
            with torch.set_grad_enabled(jointly):
                z_0 = noisy_latents(
                    self.autoencoder, encoding, self.prior.diffusion.gamma_0, batch, generator
                )
                reading, decoder = read_chunks(self.autoencoder, batch, z_0, decoder, encoding)
            if jointly:
                nats["decoder"] = reading.nats.sum()
        loss = sum(nats.values())
        assert isinstance(loss, Tensor)  # never the 0 of an empty sum
        return Step(
            loss / batch.total_bytes,
            {name: value.detach() for name, value in nats.items()},
            count_characters(batch),
            map_carry(torch.detach, Carry(encoder, decoder, context_state)),
        )
