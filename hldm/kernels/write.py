"""A chunk for a whole batch in a single call of C++: decoder, draw and encoder in turns, then its latent.

What `hldm.generation.chunk` does event by event in torch, to rounding, by the same names.
Like `hldm.kernels.stack`, this reads the parameters where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hldm.config import GenerationConfig
from hldm.generation.chunk import Piece, Written, pieces_of
from hldm.generation.draft import ORDER, ChunkDraft, Draft
from hldm.kernels.panels import packed_linear, packed_stack
from hldm.kernels.stack import copy_of, stack_call
from hldm.kernels.structs import run, struct, weights_of
from hldm.model.autoencoder import Autoencoder
from hldm.model.state import DecoderState, EncoderState
from hldm.text.bytes import END_OF_CHUNK, START

ALONE = 3  # so many rows are written one by one, by weights in panels; more share a step
GUESSES = 7  # of a pass, at most: MOST - 1 of stretch.h


def _parameters(autoencoder: Any) -> dict[str, Any]:
    """The parameters outside of the stacks, by their names in `Writing` of hldm/kernels/cpp/writing.h."""
    settings = autoencoder.settings
    found = {"write": autoencoder.write.weight, "outputs": weights_of(autoencoder.outputs)}
    if not autoencoder.latent_dim:
        return found
    placed, read, normaliser = autoencoder.from_latent, autoencoder.to_latent, autoencoder.normaliser
    found |= {
        "from_latent": [*weights_of(placed.inner), placed.place.weight, *weights_of(placed.outer)],
        "read": autoencoder.read.weight,
    }
    if settings.reads_text:
        found["from_text"] = weights_of(autoencoder.from_text)
    if settings.trunk_layers:
        found["to_trunk"] = weights_of(autoencoder.to_trunk)
        found["from_trunk"] = weights_of(autoencoder.from_trunk)
    if settings.pooling == "mean":
        found["to_latent"] = [*weights_of(read.inner, read.outer), read.place.weight]
        found["to_latent"] += [normaliser.mean, normaliser.deviation]
        found["pooled"] = read.outer.in_features
    found["known_width"] = settings.known_width
    return found | {"placed": placed.outer.in_features, "z": autoencoder.latent_dim}


def _drafted(draft: Draft, texts: Sequence[bytes]) -> dict[str, Any]:
    """A draft's tables, by their names in `Writing`. texts: written so far, of each row"""
    if isinstance(draft, ChunkDraft):
        strings = {"string_at": draft.at, "string_text": draft.text, "terms": draft.terms.contiguous()}
        return {**strings, "strings": len(draft.at) - 1, "guesses": GUESSES}
    history = [int.from_bytes(text[-ORDER:], "big") for text in texts]
    return {
        "context_keys": draft.keys,
        "context_next": draft.following,
        "contexts": len(draft.keys),
        "history": torch.tensor(history),
        "guesses": GUESSES,
    }


class Writing:
    """Rows that are written on, chunk by chunk or stretch by stretch; their states are written over.

    What a call needs is laid out once: to gather it took as long as half of a row's chunk (measured).
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        encoder: EncoderState | None,
        decoder: DecoderState,
        settings: GenerationConfig,
        *,
        alone: bool = False,
        draft: Draft | None = None,
        texts: Sequence[bytes] = (),
    ):
        """encoder, decoder: states after the text so far, left as they are; encoder None: the twin

        alone: write each row by itself, by weights that are packed here;  draft: then guesses its symbols
        texts: so far, of each row
        """
        self.autoencoder, rows = autoencoder, len(decoder.symbol)
        events = autoencoder.chunking.max_bytes + (encoder is not None)
        self.decoder = DecoderState(copy_of(decoder.griffin), decoder.symbol.clone())
        self.encoder = encoder
        self._u = torch.zeros(rows, events)
        self._emitted = torch.full((rows, events), END_OF_CHUNK)
        self._opening = torch.zeros(rows, dtype=torch.bool)
        self._symbol = torch.full((rows,), START)
        self.counts = torch.zeros(4, dtype=torch.long)  # passes, events, guesses, and those that were right
        given: dict[str, Any] = dict.fromkeys(("doc_start", "resets", "starts"), self._opening)
        stacks = {"decoder": (autoencoder.decoder, self.decoder.griffin)}
        if encoder is not None:
            given |= self._lay_out(encoder, events, stacks)
        if alone:
            given |= self._pack(stacks) | ({} if draft is None else _drafted(draft, texts))
        self._call = struct("writing.h", "Writing")(
            rows=rows,
            events=events,
            temperature=settings.decoder_temperature,
            top_p=settings.top_p,
            floor=autoencoder.byte_floor,
            u=self._u,
            emitted=self._emitted,
            symbol=self._symbol,
            counts=self.counts,
            **{name: stack_call(*parts) for name, parts in stacks.items()},
            **given,
            **_parameters(autoencoder),
        )
        # what is read must stay where it is: weights that were moved are found by the first of them
        self._held = [parameter.detach() for parameter in autoencoder.parameters()]
        self._first = autoencoder.write.weight.data_ptr()

    def _lay_out(self, encoder: EncoderState, events: int, stacks: dict[str, Any]) -> dict[str, Any]:
        """What the latent model carries and returns, by the names in `Writing`."""
        settings, rows = self.autoencoder.settings, len(encoder.feature)
        griffin = copy_of(encoder.griffin)
        feature = encoder.feature.clone(memory_format=torch.contiguous_format)
        self.encoder = EncoderState(griffin, feature, (), feature)
        stacks["encoder"] = self.autoencoder.encoder, griffin
        given: dict[str, Any] = {}
        if settings.trunk_layers:
            trunk = copy_of(encoder.trunk)
            known = encoder.known.clone(memory_format=torch.contiguous_format)
            self.encoder = EncoderState(griffin, feature, trunk, known)
            stacks["trunk"] = self.autoencoder.trunk, trunk
            given["trunk_output"] = known
        always = torch.ones(rows, dtype=torch.bool)
        self._features = feature.new_zeros(rows, events - 1, feature.shape[1])
        self._latents = feature.new_empty(rows, self.autoencoder.latent_dim)
        self._latent = torch.empty_like(self._latents)
        return given | {
            "resets": self._opening if settings.carry_state else always,
            "starts": always,
            "before": self.encoder.known,
            "latent": self._latent,
            "feature": feature,
            "features": self._features,
            "latents": self._latents,
        }

    def _pack(self, stacks: dict[str, Any]) -> dict[str, Any]:
        """Weights in panels, by their names in `Writing`."""
        autoencoder: Any = self.autoencoder
        panels = packed_linear(autoencoder.outputs)
        if autoencoder.latent_dim:
            panels += packed_linear(autoencoder.from_latent.outer)
            panels += packed_linear(autoencoder.from_text) if autoencoder.settings.reads_text else []
        given: dict[str, Any] = {"panels": panels}
        for name in ("decoder", "encoder") if autoencoder.latent_dim else ("decoder",):
            model, state = stacks[name]
            given[f"{name}_panels"] = stack_call(model, state, packed_stack(model))
        return given

    def _run(self, opens: Sequence[bool], generators: Sequence[torch.Generator]) -> list[Piece]:
        weight = self.autoencoder.write.weight
        if weight.data_ptr() != self._first or weight.dtype != torch.float32:
            raise RuntimeError("the model's weights were moved or cast while a text was being written")
        for row, generator in zip(self._u, generators, strict=True):
            torch.rand(len(row), generator=generator, out=row)
        self._opening.copy_(torch.tensor(opens))
        self._emitted.fill_(END_OF_CHUNK)
        run("hldm_write", self._call)
        return pieces_of(self._emitted)

    def chunks(
        self, latent: Tensor, opens: Sequence[bool], generators: Sequence[torch.Generator]
    ) -> tuple[list[Piece], Tensor]:
        """One chunk a row of latents (b z), and the latents (b 1 z) that the encoder reads it back to."""
        self._latent.copy_(latent)
        pieces = self._run(opens, generators)
        last = torch.tensor([piece.text[-1] for piece in pieces])
        self.decoder = self.decoder._replace(symbol=last)
        if self.autoencoder.settings.pooling == "mean":
            return pieces, self._latents[:, None].clone()
        length = torch.tensor([len(piece.text) for piece in pieces])
        raw = self.autoencoder.to_latent.of_chunk(self._features, length)
        return pieces, self.autoencoder.normaliser(raw)

    def stretches(self, opens: Sequence[bool], generators: Sequence[torch.Generator]) -> list[Piece]:
        """max_bytes symbols of the twin a row, or fewer where its document ends."""
        self._symbol.copy_(torch.where(torch.tensor(opens), START, self.decoder.symbol))
        pieces = self._run(opens, generators)
        self.decoder = self.decoder._replace(symbol=self._emitted[:, -1].clone())
        return pieces


def write_chunks(
    autoencoder: Autoencoder,
    latent: Tensor,
    encoder: EncoderState,
    decoder: DecoderState,
    opens: Sequence[bool],
    settings: GenerationConfig,
    generators: Sequence[torch.Generator],
) -> Written:
    """`hldm.generation.chunk.write_chunks`."""
    writing = Writing(autoencoder, encoder, decoder, settings)
    pieces, latents = writing.chunks(latent, opens, generators)
    assert writing.encoder is not None
    return Written(pieces, latents, writing.encoder, writing.decoder)


def write_bytes(
    autoencoder: Autoencoder,
    state: DecoderState,
    opens: Sequence[bool],
    settings: GenerationConfig,
    generators: Sequence[torch.Generator],
) -> tuple[list[Piece], DecoderState]:
    """`hldm.generation.chunk.write_bytes`."""
    writing = Writing(autoencoder, None, state, settings)
    return writing.stretches(opens, generators), writing.decoder
