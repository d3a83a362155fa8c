"""What the decoder makes of a window, given z_0 of each chunk: nats of every symbol and chunk.

The decoder's half of the bound, -log p(x_c | z_0, h); its layers are part of `hldm.model.autoencoder`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import diffuse
from hldm.model.ops import softmax_nats
from hldm.model.state import DecoderState, Encoding
from hldm.text.events import Events
from hldm.text.windows import Batch, Window, draw_normal


def noisy_latents(encoding: Encoding, gamma_0: float, batch: Batch, generator: torch.Generator) -> Tensor:
    """z_0 = alpha_0 mu + sigma_0 eps, what the decoder reads. (b n z)."""
    noise = draw_normal(batch, encoding.latents.shape[1:], generator)
    gamma = encoding.latents.new_full(encoding.latents.shape[:-1], gamma_0)
    return diffuse(encoding.latents, gamma, noise)


class Reading(NamedTuple):
    """What the decoder made of a window."""

    nats: Tensor  # (b n) -log p of each chunk's bytes and end
    symbol_nats: Tensor  # (b t') of each event
    logits: Tensor  # (b t' v) of its symbol
    events: Events  # what it was to write

    @property
    def correct(self) -> Tensor:
        """(b t') bool: the likeliest symbol is the right one."""
        return (self.logits.argmax(dim=-1) == self.events.target) & self.events.mask


def read_chunks(
    autoencoder: Autoencoder,
    window: Window,
    latent: Tensor | None,
    state: DecoderState,
    encoding: Encoding | None = None,
) -> tuple[Reading, DecoderState]:
    """Score a window's bytes given its latents z_0 (b n z), and what the encoder made of them."""
    events = autoencoder.events(window, state)
    conditioning = None if encoding is None else autoencoder.condition(events, encoding)
    logits, griffin = autoencoder.decode(events, latent, state.griffin, conditioning)
    nats = symbol_nats(logits, events, autoencoder.byte_floor)
    reading = Reading(sum_by_chunk(nats, events, window.chunks), nats, logits, events)
    return reading, DecoderState(griffin, events.last)


def symbol_nats(logits: Tensor, events: Events, floor: float = 0.0) -> Tensor:
    """-log p of each event's target in nats, 0 where padded. (b t' 258) -> (b t').

    floor: p = (1 - floor) softmax(logits) + floor / 258
    """
    nats = softmax_nats(logits.float().flatten(0, 1), events.target.flatten())
    if floor:
        even = nats.new_tensor(math.log(floor / logits.shape[-1]))
        nats = -torch.logaddexp(math.log1p(-floor) - nats, even)
    return nats.view_as(events.target) * events.mask


def floored(logits: Tensor, floor: float) -> Tensor:
    """Logits (... v) of the same p."""
    if not floor:
        return logits
    log_p = logits.log_softmax(dim=-1) + math.log1p(-floor)
    return torch.logaddexp(log_p, log_p.new_tensor(math.log(floor / logits.shape[-1])))


def sum_by_chunk(values: Tensor, events: Events, chunks: int) -> Tensor:
    """Sum over the events of each chunk. (b t') -> (b n)."""
    return values.new_zeros(values.shape[0], chunks).scatter_add(1, events.chunk, values)
