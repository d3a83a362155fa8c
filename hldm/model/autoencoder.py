"""Bytes to one latent a chunk, and back: Griffin encoder, normaliser, trunk over chunks, Griffin decoder.

The encoder reads a page and carries its state from chunk to chunk; a chunk's latent mu is what its bytes'
features make together (hldm.model.readouts), standardised. The trunk, a wider Griffin that takes one step a chunk
(`trunk_layers`), turns the encoder's features of each chunk into a summary of the text so far. The prior and
the decoder of the next chunk are both conditioned on it. The decoder writes bytes from one latent
until it emits an end, and may read the encoder's feature at the byte before, too (`reads_text`). Its latent
is z_0 = alpha_0 mu + sigma_0 eps, the diffusion state at gamma_0 (hldm.model.diffusion), but it draws no noise
itself. With latent_dim 0 encoder and trunk are gone, the decoder's unit is the document, and what remains is a
plain autoregressive character Griffin: the twin.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hldm.config import AutoencoderConfig, ChunkingConfig, section_from_dict, to_dict
from hldm.model.griffin import Griffin
from hldm.model.ops import take_rows
from hldm.model.readouts import (
    LatentNormaliser,
    MeanReadout,
    PlacedReadout,
    StridedReadout,
    pool_by_chunk,
    shares,
)
from hldm.model.state import DecoderState, EncoderState, Encoding, GriffinState
from hldm.runs.saved_model import SavedModel
from hldm.text.bytes import OUTPUTS, START, VOCABULARY
from hldm.text.events import Events, decoder_events
from hldm.text.windows import Window

# Bytes never seen in training cost up to 39 bits each without it, those of the text it was trained on 0.001 with it.
BYTE_FLOOR = 1e-3


class Autoencoder(SavedModel):
    """Griffin encoder and decoder around one latent a chunk."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        autoencoder: dict,
        chunking: dict,
        gamma_0: float = 0.0,
        segmenter: str = "",
        byte_floor: float = 0.0,
    ):
        """gamma_0: the noise its decoder is trained to read through;  segmenter: fingerprint of what cuts its text;

        byte_floor: share of the symbols' probability that is spread evenly over all of them; what scores or draws
        symbols adds it (`hldm.model.likelihood`)
        """
        super().__init__()
        self.byte_floor = byte_floor
        self.settings = section_from_dict(AutoencoderConfig, autoencoder)
        self.chunking = section_from_dict(ChunkingConfig, chunking)
        self.attached_chunker: object | None = None  # what cuts its text (hldm.chunking.strategies)
        encoder, decoder = self.settings.encoder, self.settings.decoder
        z = self.latent_dim = self.settings.latent_dim
        if z:
            self.read = nn.Embedding(VOCABULARY, encoder.width)
            self.encoder = Griffin(encoder, window=self.chunking.max_bytes)
            readout = StridedReadout if self.settings.pooling == "strided" else MeanReadout
            self.to_latent = readout(encoder.width, z, self.chunking.max_bytes)
            self.normaliser = LatentNormaliser(z)
            self.from_latent = PlacedReadout(z, decoder.width, self.chunking.max_bytes + 1)
            if self.settings.reads_text:
                self.from_text = nn.Linear(encoder.width, decoder.width)
            if self.settings.trunk_layers:
                self.to_trunk = nn.Linear(2 * encoder.width, self.settings.trunk_width)
                self.trunk = Griffin(self.settings.trunk, window=1)
                self.from_trunk = nn.Linear(self.settings.trunk_width, decoder.width)
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
        return cls(to_dict(autoencoder), to_dict(chunking), gamma_0, byte_floor=BYTE_FLOOR)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the stacks' activations in the backward pass: less memory, more time."""
        for module in self.modules():
            if isinstance(module, Griffin):
                module.gradient_checkpointing = True

    def encoder_state(self, batch: int, device: torch.device | None = None) -> EncoderState:
        """State before the first byte."""
        width, known = self.settings.encoder.width, self.settings.known_width
        return EncoderState(
            self.encoder.initial_state(batch, device),
            torch.zeros(batch, width, device=device),
            self.trunk.initial_state(batch, device) if self.settings.trunk_layers else (),
            torch.zeros(batch, known, device=device),
        )

    def decoder_state(self, batch: int, device: torch.device | None = None) -> DecoderState:
        """State before the first symbol."""
        symbol = torch.full((batch,), START, device=device)
        return DecoderState(self.decoder.initial_state(batch, device), symbol)

    def encode(self, window: Window, state: EncoderState) -> tuple[Encoding, EncoderState]:
        """mu of each chunk of a window, projected from its bytes' features and standardised.

        Also what is known before and after each chunk. state: after the text before the window.
        """
        y, griffin = self.encoder(
            self.read(window.bytes), state.griffin, window.doc_start, window.chunk_start, window.length
        )
        mask, opens, count = window.is_chunk, window.opens_document, window.count[:, None]
        raw = self.to_latent.of_chunks(y, window)  # (b n z)
        if self.training:
            self.normaliser.observe(raw[mask])
        ending = take_rows(y, window.last_byte) * mask[..., None]  # (b n d)
        feature = take_rows(torch.cat([state.feature[:, None], ending], dim=1), count)[:, 0]
        after, trunk = ending, state.trunk
        if self.settings.trunk_layers and window.chunks:
            summary = self.to_trunk(torch.cat([ending, pool_by_chunk(y, window)], dim=-1))
            after, trunk = self.trunk(summary, state.trunk, opens, opens, window.count)
            after = after * mask[..., None]
        # before chunk 0, 1, ..., and after the last
        known = torch.cat([state.known[:, None], after], dim=1)
        before = known[:, : window.chunks] * (mask & ~opens)[..., None]
        known = take_rows(known, count)[:, 0]
        features = torch.cat([state.feature[:, None], y], dim=1)
        encoding = Encoding(self.normaliser(raw) * mask[..., None], mask, opens, after, before, features)
        return encoding, EncoderState(griffin, feature, trunk, known)

    def close_chunk(
        self, y: Tensor, griffin: GriffinState, length: Tensor, opens: Tensor, state: EncoderState
    ) -> tuple[Tensor, EncoderState]:
        """The latent (b 1 z) and the state that `encode` gives, for one chunk a row, as it is written.

        y: (b l d) features of its bytes, griffin: the state after them;  length: (b), at least 1;  opens: (b 1) bool
        """
        latents = self.normaliser(self.to_latent.of_chunk(y, length))
        feature = take_rows(y, length[:, None] - 1)  # (b 1 d)
        known, trunk = feature, state.trunk
        if self.settings.trunk_layers:
            summary = self.to_trunk(torch.cat([feature, shares(y, length) @ y], dim=-1))
            known, trunk = self.trunk(summary, state.trunk, opens, opens)
        return latents, EncoderState(griffin, feature[:, 0], trunk, known[:, 0])

    def events(self, window: Window, state: DecoderState) -> Events:
        """What the decoder reads and writes for a window (see `decoder_events`).

        The twin's unit is the document, so that its attention is a sliding window, as in Griffin.
        """
        return decoder_events(window, state.symbol, by_document=self.latent_dim == 0)

    def condition(self, events: Events, encoding: Encoding) -> Tensor | None:
        """The decoder's conditioning on the text before each event. (b t' d), None for a fresh decoder.

        The sum of the encoder's feature at the byte before the event and the summary before its chunk, projected.
        """
        conditioning = None
        if self.settings.reads_text:  # projected once a byte: some bytes come before two events
            conditioning = take_rows(self.from_text(encoding.features), events.bytes_before)
            conditioning = conditioning * ~events.doc_start[..., None]  # nothing comes before a document
        if self.settings.trunk_layers:
            known = take_rows(self.from_trunk(encoding.before), events.chunk)
            conditioning = known if conditioning is None else conditioning + known
        return conditioning

    def decode(
        self, events: Events, latent: Tensor | None, griffin: GriffinState, conditioning: Tensor | None = None
    ) -> tuple[Tensor, GriffinState]:
        """Logits (b t' 258) of the next symbol at every event of a window, and the state after it.

        latent: (b n z) z_0 of each chunk; None for the twin
        conditioning: (b t' d) on the text before each event (see `condition`); None for a fresh decoder and the twin
        """
        return self.decode_symbols(
            events.symbol,
            events.doc_start,
            events.unit_start,
            griffin,
            latent=latent,
            chunk=events.chunk,
            place=None if latent is None else events.place,
            conditioning=conditioning,
            length=events.length,
        )

    def decode_symbols(
        self,
        symbol: Tensor,
        doc_start: Tensor,
        unit_start: Tensor,
        griffin: GriffinState,
        *,
        latent: Tensor | None = None,
        chunk: Tensor | None = None,
        place: Tensor | None = None,
        conditioning: Tensor | None = None,
        length: Tensor | None = None,
    ) -> tuple[Tensor, GriffinState]:
        """The same without a window: one symbol a row while text is written, or the twin's text as it is.

        symbol, doc_start, unit_start: (b t) as in `Events`
        latent: (b n z) z_0 of the chunks they belong to: chunk (b t), the first when None, and place (b t) in it
        conditioning: as for `decode`;  length: (b) valid symbols of each row; None: all
        """
        x = self.write(symbol)
        if latent is not None:
            assert place is not None
            inner = self.from_latent.inner(latent)  # (b n 2d)
            chunk = torch.zeros_like(place) if chunk is None else chunk
            x = x + self.from_latent.outer(self.from_latent.features(inner, chunk, place))
        if conditioning is not None:
            x = x + conditioning
        elif self.latent_dim and (self.settings.reads_text or self.settings.trunk_layers):
            raise ValueError("this decoder is conditioned on the text before: pass conditioning=")
        # A fresh decoder has nothing but the latent: the state is reset at every chunk.
        reset = doc_start if self.settings.carry_state else unit_start
        y, griffin = self.decoder(x, griffin, reset, unit_start, length)
        return self.outputs(y), griffin
