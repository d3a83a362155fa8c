"""What each stage minimises, and the bound that both halves meet in.

    -log p(x_c | x_<c)  <=  E[-log p(x_c | z_0)]  +  diffusion term  +  KL(q(z_1) || N(0, I))
                            decoder                 latent              end

(VDM, arXiv 2107.00630, per chunk c with its end symbol.) An objective is a module: `forward(batch,
carry, generator, progress)` returns a loss normalised by the bytes of the *global* batch, so gradients
add up to the same whatever the ranks and micro-batches; `hldm.training.trainer` knows no more than that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hldm.config import AutoencoderConfig
from hldm.model.autoencoder import Autoencoder
from hldm.model.contextualiser import ContextState
from hldm.model.decoder import noisy_latents, read_chunks
from hldm.model.diffusion import alpha_sigma
from hldm.model.mixture import MixturePredictor
from hldm.model.prior import Prior, price_latents
from hldm.model.state import DecoderState, EncoderState, Encoding, map_carry
from hldm.text.windows import Batch, draw_normal, draw_uniform
from hldm.training.latent_cache import CachedLatents


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


class GaussianRate(nn.Module):
    """A light prior for stage one: N(m(h), s(h)^2) for z_0, h the encoder's feature before the chunk.

    Its cost KL(q(z_0 | x) || N(m, s^2)) is in closed form, and with the decoder's it is a bound too.
    """

    def __init__(self, width: int, latent_dim: int):
        super().__init__()
        self.predict = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * latent_dim)
        )

    def forward(self, encoding: Encoding, gamma_0: float) -> Tensor:
        """Nats per chunk (b n)."""
        mean, log_scale = self.predict(encoding.before).chunk(2, dim=-1)
        log_scale = 4 * torch.tanh(log_scale / 4)  # e^-4 .. e^4: never so sharp that one miss costs all
        alpha, sigma = alpha_sigma(torch.as_tensor(gamma_0, device=mean.device))
        away = (alpha * encoding.latents - mean).square() + sigma.square()
        kl = log_scale - sigma.log() + 0.5 * away * (-2 * log_scale).exp() - 0.5
        return kl.sum(dim=-1) * encoding.mask


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

    def __init__(
        self, autoencoder: Autoencoder, settings: AutoencoderConfig, gamma_0: float, prior: Prior | None
    ):
        """prior: the light one of rate 'diffusion', which stage two may start from."""
        super().__init__()
        self.autoencoder, self.settings, self.gamma_0 = autoencoder, settings, gamma_0
        self.prior = prior
        gaussian = settings.rate == "gaussian" and autoencoder.latent_dim > 0
        width = settings.known_width
        self.gaussian = GaussianRate(width, autoencoder.latent_dim) if gaussian else None
        mixture = settings.rate == "mixture" and autoencoder.latent_dim > 0
        self.mixture = (
            MixturePredictor(width, autoencoder.latent_dim, settings.components) if mixture else None
        )

    def initial_carry(self, rows: int, device: torch.device) -> Carry:
        """State before the first window."""
        latent = self.autoencoder.latent_dim > 0
        return Carry(
            self.autoencoder.encoder_state(rows, device) if latent else None,
            self.autoencoder.decoder_state(rows, device),
            self.prior.initial_state(rows, device) if self.prior is not None else None,
        )

    def end_step(self, skipped: bool) -> None:
        """Fold the step's statistics into normaliser and schedule; forget them when it was not finite."""
        if self.autoencoder.latent_dim:
            self.autoencoder.normaliser.update(skipped)
        if self.prior is not None:
            self.prior.schedule.update(skipped)

    def forward(self, batch: Batch, carry: Carry, generator: torch.Generator, progress: float) -> Step:
        """Loss of one window."""
        autoencoder, settings = self.autoencoder, self.settings
        encoder, context_state, z_0, encoding = carry.encoder, carry.context, None, None
        rates: dict[str, Tensor] = {}
        if encoder is not None:
            encoding, encoder = autoencoder.encode(batch, encoder)
            z_0 = noisy_latents(encoding, self.gamma_0, batch, generator)
            if settings.clean_latents:
                # Rare words drown in noise; without it encoder and decoder learn to tell them apart, too.
                clean = draw_uniform(batch, (z_0.shape[1],), generator) < settings.clean_latents
                alpha, _ = alpha_sigma(torch.as_tensor(self.gamma_0, device=z_0.device))
                z_0 = torch.where(clean[..., None], alpha * encoding.latents, z_0)
            if settings.latent_dropout:
                kept = draw_uniform(batch, (z_0.shape[1],), generator) >= settings.latent_dropout
                z_0 = z_0 * kept[..., None]
            if self.prior is not None and context_state is not None:
                context, context_state = self.prior.contextualiser(
                    encoding.latents, encoding.mask, encoding.doc_start, context_state, encoding.after
                )
                paid = price_latents(self.prior, encoding, context, batch, generator, hide=True)
                rates = {"latent": paid.latent.sum(), "end": paid.end.sum()}
            elif self.gaussian is not None:
                rates = {"latent": self.gaussian(encoding, self.gamma_0).sum()}
            elif self.mixture is not None:
                noise = draw_normal(batch, encoding.latents.shape[1:], generator)
                weights = self.mixture.log_weights(encoding.before)
                nats = self.mixture.rate(encoding.latents, noise, self.gamma_0, weights)
                rates = {"latent": (nats * encoding.mask).sum()}
        hidden = None
        if settings.byte_dropout:
            # as many as events there may be: every byte and an end for each
            width = 2 * batch.bytes.shape[1]
            hidden = draw_uniform(batch, (width,), generator) < settings.byte_dropout
        assert carry.decoder is not None
        reading, decoder = read_chunks(autoencoder, batch, z_0, carry.decoder, encoding, hidden)
        paid_for = {"decoder": reading.nats.sum(), **rates}
        loss = paid_for["decoder"] + rate_weight(settings, progress) * sum(rates.values())
        if encoding is not None:
            loss = loss + (autoencoder.normaliser.hold(encoding.latents) * encoding.mask).sum()
        return Step(
            loss / batch.total_bytes,
            {name: value.detach() for name, value in paid_for.items()},
            batch.characters,
            map_carry(torch.detach, Carry(encoder, decoder, context_state)),
        )


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
            mask = batch.is_chunk
            latents, after = self.latents.of(batch.chunk_index.clamp(min=0), self.prior.latent_dim)
            # no decoder reads along with a cache, so nobody asks for what comes before the chunks
            none = after[..., :0]
            return Encoding(latents * mask[..., None], mask, batch.opens_document, after, none, none), None
        with torch.set_grad_enabled(learn):
            return self.autoencoder.encode(batch, encoder)

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
                z_0 = noisy_latents(encoding, self.prior.diffusion.gamma_0, batch, generator)
                reading, decoder = read_chunks(self.autoencoder, batch, z_0, decoder, encoding)
            if jointly:
                nats["decoder"] = reading.nats.sum()
        loss = sum(nats.values())
        assert isinstance(loss, Tensor)  # never the 0 of an empty sum
        return Step(
            loss / batch.total_bytes,
            {name: value.detach() for name, value in nats.items()},
            batch.characters,
            map_carry(torch.detach, Carry(encoder, decoder, context_state)),
        )
