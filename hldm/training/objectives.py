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
from hldm.model.likelihood import noisy_latents, read_chunks
from hldm.model.mixture import LOGIT_CAP, MixturePredictor
from hldm.model.prior import Prior, price_latents
from hldm.model.state import ContextState, DecoderState, EncoderState, map_carry
from hldm.model.vitals import signs_of_latents, signs_of_schedule, signs_of_weights
from hldm.text.windows import Batch, draw_normal


class Carry(NamedTuple):
    """State of every stream between windows; None for parts the objective lacks."""

    encoder: EncoderState | None = None
    decoder: DecoderState | None = None
    context: ContextState | None = None


class Step(NamedTuple):
    """One forward pass over (part of) a batch."""

    loss: Tensor  # scalar: nats per byte of the global batch
    nats: dict[str, Tensor]  # sums over this part, detached, by name
    characters: Tensor  # in this part
    carry: Carry  # detached


# Last share of the progress over which the weight of the rate goes to 1, in all that docs/results.md has.
RATE_ANNEAL = 0.5


def rate_weight(settings: AutoencoderConfig, progress: float) -> float:
    """What a nat of the rate weighs against one of the decoder: rate_weight, in the end 1.

    Below 1 latents are cheap, and an encoder that has yet to learn uses them; the reported bound has weight 1.
    Linear over the last RATE_ANNEAL of the progress.
    """
    done = min(max((progress - 1) / RATE_ANNEAL + 1, 0.0), 1.0)
    return settings.rate_weight + done * (1 - settings.rate_weight)


def cost_of(batch: Batch, nats: Tensor) -> Tensor:
    """The nats of all chunks (b n), each as much as it counts in the loss (`Batch.weight`)."""
    return nats.sum() if batch.weight is None else (nats * batch.weight).sum()


class AutoencoderObjective(nn.Module):
    """Stage one: reconstruction from noisy latents plus what they cost (or the twin: plain bytes)."""

    def __init__(self, autoencoder: Autoencoder, settings: AutoencoderConfig, gamma_0: float):
        """gamma_0: the noise that the decoder reads through."""
        super().__init__()
        self.autoencoder, self.settings, self.gamma_0 = autoencoder, settings, gamma_0
        self.mixture: MixturePredictor | None = None  # what prices the latents; stage two starts from it
        if autoencoder.latent_dim and settings.components:
            self.mixture = MixturePredictor(
                settings.known_width, autoencoder.latent_dim, settings.components, LOGIT_CAP
            )
        self._seen: tuple[Tensor, ...] = ()  # of the last batch: its mask, latents and log weights
        self.may_leave_out = False  # whether there are steps in which some parameters have no gradient

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

    def signs(self) -> dict[str, float]:
        """Whether latents and mixture are alive (`hldm.model.vitals`), by the last batch."""
        if not self._seen:
            return {}
        mask, latents, *log_weights = self._seen
        return signs_of_latents(latents[mask]) | (
            signs_of_weights(log_weights[0][mask]) if log_weights else {}
        )

    def forward(self, batch: Batch, carry: Carry, generator: torch.Generator, progress: float) -> Step:
        """Loss of one window."""
        autoencoder, settings = self.autoencoder, self.settings
        encoder, z_0, encoding = carry.encoder, None, None
        rates: dict[str, Tensor] = {}
        if encoder is not None:
            encoding, encoder = autoencoder.encode(batch, encoder)
            z_0 = noisy_latents(encoding, self.gamma_0, batch, generator)
            self._seen = (encoding.mask, encoding.latents.detach())
            if self.mixture is not None:
                noise = draw_normal(batch, encoding.latents.shape[1:], generator)
                weights = self.mixture.log_weights(encoding.before)
                nats = self.mixture.rate(encoding.latents, noise, self.gamma_0, weights)
                rates = {"latent": nats * encoding.mask}
                self._seen += (weights.detach(),)
        assert carry.decoder is not None
        reading, decoder = read_chunks(autoencoder, batch, z_0, carry.decoder, encoding)
        paid_for = {"decoder": reading.nats, **rates}  # (b n) each
        loss = cost_of(batch, reading.nats)
        for nats in rates.values():
            loss = loss + rate_weight(settings, progress) * cost_of(batch, nats)
        if encoding is not None:
            loss = loss + (autoencoder.normaliser.hold(encoding.latents) * encoding.mask).sum()
        return Step(
            loss / batch.total_bytes,
            {name: value.detach().sum() for name, value in paid_for.items()},
            batch.characters,
            map_carry(torch.detach, Carry(encoder, decoder)),
        )


class PriorObjective(nn.Module):
    """Stage two: the latent terms of the bound. The autoencoder is frozen."""

    def __init__(self, prior: Prior, autoencoder: Autoencoder):
        super().__init__()
        self.prior, self.autoencoder = prior, autoencoder.requires_grad_(False)
        self._seen: tuple[Tensor, ...] = ()  # of the last batch: its mask and latents
        self.may_leave_out = False

    def train(self, mode: bool = True) -> PriorObjective:
        """Training mode for the prior; the autoencoder stays as it will be used."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def initial_carry(self, rows: int, device: torch.device) -> Carry:
        """State before the first window."""
        encoder = self.autoencoder.encoder_state(rows, device)
        return Carry(encoder, context=self.prior.initial_state(rows, device))

    def end_step(self, skipped: bool) -> None:
        """Fold the step's statistics into the schedule; forget them when it was not finite."""
        self.prior.schedule.update(skipped)

    def signs(self) -> dict[str, float]:
        """Whether latents and schedule are alive (`hldm.model.vitals`), by the last batch."""
        if not self._seen:
            return {}
        mask, latents = self._seen
        return signs_of_latents(latents[mask]) | signs_of_schedule(self.prior.schedule)

    def forward(self, batch: Batch, carry: Carry, generator: torch.Generator, progress: float) -> Step:
        """Loss of one window."""
        assert carry.encoder is not None and carry.context is not None
        with torch.no_grad():
            encoding, encoder = self.autoencoder.encode(batch, carry.encoder)
        self._seen = (encoding.mask, encoding.latents)
        context, context_state = self.prior.contextualiser(
            encoding.latents, encoding.mask, encoding.doc_start, carry.context, encoding.after
        )
        paid = price_latents(self.prior, encoding, context, batch, generator, hide=True)
        return Step(
            (cost_of(batch, paid.latent) + cost_of(batch, paid.end)) / batch.total_bytes,
            {"latent": paid.latent.detach().sum(), "end": paid.end.detach().sum()},
            batch.characters,
            map_carry(torch.detach, Carry(encoder, context=context_state)),
        )
