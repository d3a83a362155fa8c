"""Bytes to one latent a chunk, and back: Griffin encoder, normaliser, Griffin decoder.

The encoder reads a page and carries its state from chunk to chunk; a chunk's latent mu is the mean of
its bytes' features, projected and standardised. The decoder writes bytes from one latent until it emits
an end, and may read the encoder's feature at the byte before (`reads_text`). It reads
z_0 = alpha_0 mu + sigma_0 eps, the diffusion state at gamma_0 (hldm.diffusion), but draws no noise itself.
With latent_dim 0 the encoder is gone, the decoder's unit is the document, and what remains is a plain
autoregressive character Griffin: the twin.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hldm.chunking import Chunker, make_chunker, pool_by_chunk, segments
from hldm.config import AutoencoderConfig, ChunkingConfig, section_from_dict
from hldm.griffin import Griffin, GriffinState
from hldm.text import END_OF_CHUNK, END_OF_DOCUMENT, HIDDEN, START, VOCABULARY
from hldm.weights import SavedModel

OUTPUTS = 258  # what the decoder may emit: 256 bytes and the two ends


class EncoderState(NamedTuple):
    """What the encoder carries from one stretch of text to the next."""

    griffin: GriffinState
    feature: Tensor  # (b d) at the last byte: what is known before the next chunk


class DecoderState(NamedTuple):
    """What the decoder carries from one stretch to the next."""

    griffin: GriffinState
    symbol: Tensor  # (b) last symbol written, the next step's input unless a unit starts


class Encoding(NamedTuple):
    """One latent a chunk, and what the encoder knows of the text before and after each."""

    latents: Tensor  # (b n z) mu, normalised
    mask: Tensor  # (b n) bool, real chunks
    doc_start: Tensor  # (b n) bool, first chunk of a document
    after: Tensor  # (b n d) encoder feature at the chunk's last byte
    before: Tensor  # (b n d) at the byte before the chunk; 0 at a document start
    features: Tensor  # (b t+1 d) at the byte before the window, then at each of its bytes


class Events(NamedTuple):
    """What the decoder writes for a window, in order: the bytes of each unit, then its end.

    A unit is a chunk; for the twin, a document. The t' events of a row number bytes + ends.
    """

    target: Tensor  # (b t') symbol to emit
    symbol: Tensor  # (b t') symbol read: START at the first event of a unit, else the byte before
    chunk: Tensor  # (b t') number of the chunk in the window
    length: Tensor  # (b) events of each row
    doc_start: Tensor  # (b t') first event of a document
    unit_start: Tensor  # (b t') first event of a unit: attention sees no further back
    bytes_before: Tensor  # (b t') how many bytes of the window come before the event
    last: Tensor  # (b) the symbol that the next window continues from

    @property
    def mask(self) -> Tensor:
        """(b t') bool: real events."""
        return torch.arange(self.target.shape[1], device=self.length.device) < self.length[:, None]


class PlacedReadout(nn.Module):
    """A two-layer perceptron that knows how far into its chunk it is: W_2 gelu(W_1 x + p_k).

    A mean over bytes forgets their order, and a latent must say which byte comes where: with the place k
    inside the nonlinearity both sides can read and write letter by letter from the first steps on.
    """

    def __init__(self, inputs: int, outputs: int, places: int):
        super().__init__()
        hidden = 2 * max(inputs, outputs)
        self.inner = nn.Linear(inputs, hidden)
        self.place = nn.Embedding(places, hidden)
        self.outer = nn.Linear(hidden, outputs)

    def features(self, inner: Tensor, place: Tensor) -> Tensor:
        """gelu(W_1 x + p_k), from W_1 x (b t d) and k (b t)."""
        return F.gelu(inner + self.place(place.clamp(max=self.place.num_embeddings - 1)))


def place_in_chunk(chunk_start: Tensor) -> Tensor:
    """How many positions after its chunk's start each one is. (b t) bool -> (b t)."""
    index = torch.arange(chunk_start.shape[1], device=chunk_start.device).expand_as(chunk_start)
    return index - torch.where(chunk_start, index, 0).cummax(dim=1).values


def ends_of(chunk_start: Tensor, length: Tensor) -> Tensor:
    """Last bytes of chunks: where the next one starts, or the window, which holds whole chunks, ends. (b t)."""
    ends = torch.cat([chunk_start[:, 1:], chunk_start.new_zeros(chunk_start.shape[0], 1)], dim=1)
    return ends | (torch.arange(ends.shape[1], device=ends.device) == length[:, None] - 1)


def positions(flags: Tensor, count: int) -> Tensor:
    """Where the first `count` flags of each row are set; anywhere beyond them. (b t) bool -> (b count)."""
    return (~flags).to(torch.int8).argsort(dim=1, stable=True)[:, :count]


class LatentNormaliser(nn.Module):
    """mu = (raw - mean) / deviation per dimension: measured, saved, never trained.

    Statistics of raw latents are summed up in training and folded in once an optimizer step, so
    that they are the same for any split of the batch over ranks and micro-batches.
    """

    mean: Tensor
    deviation: Tensor
    seen: Tensor
    sums: Tensor

    # Averages over about 20 steps: long enough to be quiet, short enough to follow a young encoder.
    MOMENTUM = 0.95

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # steps folded in
        # count, sum and sum of squares since the last step
        self.register_buffer("sums", torch.zeros(3, dim), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """Raw latents (... z) -> unit-scale ones."""
        return (raw - self.mean) / self.deviation

    @torch.no_grad()
    def observe(self, raw: Tensor) -> None:
        """Add raw latents (k z) to the running sums."""
        raw = raw.detach().float()
        count = torch.full_like(self.sums[0], raw.shape[0])
        self.sums += torch.stack([count, raw.sum(dim=0), raw.square().sum(dim=0)])

    @torch.no_grad()
    def update(self, skipped: bool = False) -> None:
        """Fold the sums into mean and deviation, once an optimizer step; forget them if it was skipped."""
        sums = self.sums.clone()
        self.sums.zero_()
        if skipped:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        if sums[0, 0] < 2:
            return
        mean, second = sums[1] / sums[0], sums[2] / sums[0]
        self.seen += 1
        # Debiased: the first step counts in full, later ones ever less down to 1 - momentum.
        share = max(1 - self.MOMENTUM, 1 / int(self.seen))
        old_second = self.deviation.square() + self.mean.square()
        new_mean = self.mean.lerp(mean, share)
        variance = old_second.lerp(second, share) - new_mean.square()
        self.mean.copy_(new_mean)
        self.deviation.copy_(variance.clamp(min=1e-8).sqrt())


def decoder_events(
    text: Tensor,
    length: Tensor,
    unit_start: Tensor,
    unit_end: Tensor,
    doc_start: Tensor,
    doc_end: Tensor,
    chunk_start: Tensor,
    previous: Tensor,
) -> Events:
    """Lay out what the decoder reads and writes for a window of bytes.

    text (b t), the flags (b t) bool, previous (b): symbol before the window.
    Byte t sits at event t + (units ended before t); the end of its unit right after it.
    """
    b, t = text.shape
    real = torch.arange(t, device=text.device) < length[:, None]
    ends = (unit_end & real).long()
    ended_before = ends.cumsum(dim=1) - ends
    at = torch.arange(t, device=text.device) + ended_before
    total = length + ends.sum(dim=1)
    size = int(total.max()) if b and t else 0

    def lay(byte_values: Tensor, end_values: Tensor) -> Tensor:
        """Scatter what belongs to bytes and to ends; padding lands in a spare column, cut off."""
        out = byte_values.new_zeros(b, size + 1)
        out.scatter_(1, torch.where(real, at, size), byte_values)
        out[:, size] = 0
        out.scatter_(1, torch.where(ends.bool(), at + 1, size), end_values)
        return out[:, :size]

    before = torch.cat([previous[:, None], text[:, :-1]], dim=1)
    none = torch.zeros_like(real)
    chunk = (chunk_start & real).long().cumsum(dim=1) - 1
    chunk = chunk.clamp(min=0)  # the twin's window may open inside a chunk
    last = text.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0] if t else previous
    return Events(
        target=lay(text, torch.where(doc_end, END_OF_DOCUMENT, END_OF_CHUNK)),
        symbol=lay(torch.where(unit_start, START, before), text),
        chunk=lay(chunk, chunk),
        length=total,
        doc_start=lay(doc_start & real, none),
        unit_start=lay(unit_start & real, none),
        bytes_before=lay(*(torch.arange(t, device=text.device).expand(b, t) + k for k in (0, 1))),
        last=torch.where(length > 0, last, previous),
    )


def text_before(events: Events, encoding: Encoding) -> Tensor:
    """The encoder's feature at the byte before each event. (b t' d)."""
    wide = encoding.features.shape[-1]
    return encoding.features.gather(1, events.bytes_before[..., None].expand(-1, -1, wide))


class Autoencoder(SavedModel):
    """Griffin encoder and decoder around one latent a chunk."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, autoencoder: dict, chunking: dict, gamma_0: float = 0.0, segmenter: str = ""):
        """gamma_0: the noise its decoder is trained to read through;  segmenter: fingerprint of what cuts its text"""
        super().__init__()
        self.settings = section_from_dict(AutoencoderConfig, autoencoder)
        self.chunking = section_from_dict(ChunkingConfig, chunking)
        self._chunker: Chunker | None = None
        encoder, decoder = self.settings.encoder, self.settings.decoder
        z = self.latent_dim = self.settings.latent_dim
        if z:
            self.read = nn.Embedding(VOCABULARY, encoder.width)
            self.encoder = Griffin(encoder, window=self.chunking.max_bytes)
            self.to_latent = PlacedReadout(encoder.width, z, self.chunking.max_bytes)
            self.normaliser = LatentNormaliser(z)
            self.from_latent = PlacedReadout(z, decoder.width, self.chunking.max_bytes + 1)
            if self.settings.reads_text:
                self.from_text = nn.Linear(encoder.width, decoder.width)
        self.write = nn.Embedding(VOCABULARY, decoder.width)
        # One position more than a chunk's bytes: the event that ends it.
        self.decoder = Griffin(decoder, window=self.chunking.max_bytes + 1)
        self.outputs = nn.Linear(decoder.width, OUTPUTS)
        for embedding in (m for m in self.modules() if isinstance(m, nn.Embedding)):
            nn.init.normal_(embedding.weight, std=0.5)
        nn.init.normal_(self.outputs.weight, std=0.5 * decoder.width**-0.5)
        nn.init.zeros_(self.outputs.bias)

    @classmethod
    def from_settings(
        cls, autoencoder: AutoencoderConfig, chunking: ChunkingConfig, gamma_0: float = 0.0
    ) -> Autoencoder:
        """Build from config sections."""
        return cls(asdict(autoencoder), asdict(chunking), gamma_0)

    @property
    def chunker(self) -> Chunker:
        """What cuts text for this model. Raises ConfigError where that takes a segmenter and none was given."""
        return self._chunker or make_chunker(self.chunking)

    def use_chunker(self, chunker: Chunker, segmenter: str) -> None:
        """Cut text by a segmenter of this fingerprint. Raises ValueError when it learned from another's chunks."""
        if self.config["segmenter"] not in ("", segmenter):
            raise ValueError(
                "this autoencoder was trained on another segmenter's chunks: restore that, or train again"
            )
        self.register_to_config(segmenter=segmenter)
        self._chunker = chunker

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the stacks' activations in the backward pass: less memory, more time."""
        for module in self.modules():
            if isinstance(module, Griffin):
                module.gradient_checkpointing = True

    def encoder_state(self, batch: int, device: torch.device | None = None) -> EncoderState:
        """State before the first byte."""
        width = self.settings.encoder.width
        return EncoderState(
            self.encoder.initial_state(batch, device), torch.zeros(batch, width, device=device)
        )

    def decoder_state(self, batch: int, device: torch.device | None = None) -> DecoderState:
        """State before the first symbol."""
        symbol = torch.full((batch,), START, device=device)
        return DecoderState(self.decoder.initial_state(batch, device), symbol)

    def encode(
        self,
        text: Tensor,
        length: Tensor,
        doc_start: Tensor,
        chunk_start: Tensor,
        state: EncoderState,
        chunks: int | None = None,
    ) -> tuple[Encoding, EncoderState]:
        """mu of each chunk: the mean of its bytes' features, projected and standardised.

        text (b t) bytes, a whole number of chunks; length (b); doc_start, chunk_start (b t) bool;
        chunks: pad to so many per row (the most in any row when None).
        """
        b, t = text.shape
        if doc_start.shape != (b, t) or chunk_start.shape != (b, t):
            raise ValueError(f"doc_start and chunk_start must be (b t) = {(b, t)} like the text")
        y, griffin = self.encoder(self.read(text), state.griffin, doc_start, chunk_start, length)
        where = segments(chunk_start, length)
        n = int(where.count.max()) if chunks is None and b else (chunks or 0)
        read = self.to_latent
        features = read.features(read.inner(y), place_in_chunk(chunk_start))
        raw = read.outer(pool_by_chunk(features, where, n))  # (b n z)
        mask = torch.arange(n, device=text.device) < where.count[:, None]
        if self.training:
            self.normaliser.observe(raw[mask])
        opens = doc_start.gather(1, positions(chunk_start, n)) & mask
        last = positions(ends_of(chunk_start, length), n)
        after = y.gather(1, last[..., None].expand(-1, -1, y.shape[2])) * mask[..., None]
        known = torch.cat(
            [state.feature[:, None], after], dim=1
        )  # before chunk 0, 1, ..., and after the last
        before = known[:, :n] * (mask & ~opens)[..., None]
        feature = known.gather(1, where.count[:, None, None].expand(-1, 1, y.shape[2]))[:, 0]
        features = torch.cat([state.feature[:, None], y], dim=1)
        encoding = Encoding(self.normaliser(raw) * mask[..., None], mask, opens, after, before, features)
        return encoding, EncoderState(griffin, feature)

    def read_byte(
        self, symbol: Tensor, doc_start: Tensor, chunk_start: Tensor, state: EncoderState
    ) -> EncoderState:
        """The encoder's state after one more byte a row. symbol, doc_start, chunk_start: (b 1)."""
        y, griffin = self.encoder(self.read(symbol), state.griffin, doc_start, chunk_start)
        return EncoderState(griffin, y[:, 0])

    def events(
        self,
        text: Tensor,
        length: Tensor,
        doc_start: Tensor,
        doc_end: Tensor,
        chunk_start: Tensor,
        state: DecoderState,
    ) -> Events:
        """What the decoder has to write for a window (see `decoder_events`).

        The twin's unit is the document, so that its attention is a sliding window, as in Griffin.
        """
        if self.latent_dim:
            unit_start, unit_end = chunk_start, ends_of(chunk_start, length)
        else:
            unit_start, unit_end = doc_start, doc_end
        return decoder_events(
            text, length, unit_start, unit_end, doc_start, doc_end, chunk_start, state.symbol
        )

    def decode(
        self,
        symbol: Tensor,
        latent: Tensor | None,
        chunk: Tensor,
        doc_start: Tensor,
        unit_start: Tensor,
        griffin: GriffinState,
        length: Tensor | None = None,
        place: Tensor | None = None,
        text: Tensor | None = None,
    ) -> tuple[Tensor, GriffinState]:
        """Logits of the next symbol at every event, a page or a single one.

        symbol, chunk, doc_start, unit_start: (b t'); latent: (b n z) z_0 of each chunk;
        text: (b t' d) encoder feature at the byte before each event; unused unless the decoder reads text;
        place: (b t') events since the unit's start, worked out from unit_start when None.
        Returns (b t' 258).
        """
        x = self.write(symbol)
        if latent is not None:
            told = self.from_latent.inner(latent)  # (b n 2d)
            told = told.gather(1, chunk[..., None].expand(-1, -1, told.shape[2]))
            place = place_in_chunk(unit_start) if place is None else place
            x = x + self.from_latent.outer(self.from_latent.features(told, place))
        if self.latent_dim and self.settings.reads_text:
            if text is None:
                raise ValueError("this decoder reads text: pass the encoder's features before the events")
            x = x + self.from_text(text * ~doc_start[..., None])  # a document knows of no text before it
        # A fresh decoder knows nothing but the latent: the state is reset at every chunk.
        reset = doc_start if self.settings.carry_state else unit_start
        y, griffin = self.decoder(x, griffin, reset, unit_start, length)
        return self.outputs(y), griffin

    def hide_bytes(self, symbol: Tensor, hidden: Tensor) -> Tensor:
        """Byte dropout: replace inputs where hidden (b t'), except the start of a unit."""
        return torch.where(hidden & (symbol != START), HIDDEN, symbol)


def symbol_nats(logits: Tensor, events: Events) -> Tensor:
    """-log p of each event's target in nats, 0 where padded. (b t' 258) -> (b t')."""
    nats = F.cross_entropy(logits.float().flatten(0, 1), events.target.flatten(), reduction="none")
    return nats.view_as(events.target) * events.mask


def sum_by_chunk(values: Tensor, events: Events, chunks: int) -> Tensor:
    """Sum over the events of each chunk. (b t') -> (b n)."""
    return values.new_zeros(values.shape[0], chunks).scatter_add(1, events.chunk, values)
