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
from hldm.generation.chunk import Piece, Written, draw_uniform_rows, known_of_text, pieces_of
from hldm.kernels.stack import stack_call
from hldm.kernels.structs import run, struct, weights_of
from hldm.model.autoencoder import Autoencoder
from hldm.model.state import DecoderState, EncoderState
from hldm.text.bytes import END_OF_CHUNK, START


def _parameters(autoencoder: Any) -> dict[str, Any]:
    """The parameters outside of the stacks, by their names in `Writing` of hldm/kernels/cpp/write.cpp."""
    settings = autoencoder.settings
    found = {"write": autoencoder.write.weight, "outputs": weights_of(autoencoder.outputs)}
    if not autoencoder.latent_dim:
        return found
    placed, read, normaliser = autoencoder.from_latent, autoencoder.to_latent, autoencoder.normaliser
    found |= {
        "from_latent": [placed.place.weight, *weights_of(placed.outer)],
        "read": autoencoder.read.weight,
    }
    if settings.reads_text:
        found["from_text"] = weights_of(autoencoder.from_text)
    if settings.trunk_layers:
        found["to_trunk"] = weights_of(autoencoder.to_trunk)
    if settings.pooling == "mean":
        found["to_latent"] = [*weights_of(read.inner, read.outer), read.place.weight]
        found["to_latent"] += [normaliser.mean, normaliser.deviation]
        found["pooled"] = read.outer.in_features
    return found | {"placed": placed.outer.in_features, "z": autoencoder.latent_dim}


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
    opening = torch.tensor(opens)
    always = torch.ones_like(opening)
    known = known_of_text(autoencoder, encoder, opening[:, None])
    u = draw_uniform_rows(generators, autoencoder.chunking.max_bytes + 1, opening.device)
    reading, griffin = stack_call(autoencoder.encoder, encoder.griffin)
    writing, written = stack_call(autoencoder.decoder, decoder.griffin)
    feature = encoder.feature.clone(memory_format=torch.contiguous_format)
    after = EncoderState(griffin, feature, (), feature)
    given = {}
    if autoencoder.settings.trunk_layers:
        given["trunk"], trunk = stack_call(autoencoder.trunk, encoder.trunk)
        given["trunk_output"] = u.new_empty(encoder.known.shape)
        after = after._replace(trunk=trunk, known=given["trunk_output"])
    given |= {
        "encoder": reading,
        "decoder": writing,
        "symbol": torch.full_like(opening, START, dtype=torch.long),
        "doc_start": opening,
        "resets": opening if autoencoder.settings.carry_state else always,
        "starts": always,
        "known": None if known is None else known[:, 0],
        "inner": autoencoder.from_latent.inner(latent),
        "feature": feature,
        "features": u.new_zeros(len(u), u.shape[1] - 1, feature.shape[1]),
        "latents": torch.empty_like(latent, memory_format=torch.contiguous_format),
    }
    pieces = pieces_of(_write(autoencoder, u, settings, given))
    latents = given["latents"][:, None]
    if autoencoder.settings.pooling != "mean":
        length = torch.tensor([len(piece.text) for piece in pieces])
        latents = autoencoder.normaliser(autoencoder.to_latent.of_chunk(given["features"], length))
    last = torch.tensor([piece.text[-1] for piece in pieces])
    return Written(pieces, latents, after, DecoderState(written, last))


def write_bytes(
    autoencoder: Autoencoder,
    state: DecoderState,
    opens: Sequence[bool],
    settings: GenerationConfig,
    generators: Sequence[torch.Generator],
) -> tuple[list[Piece], DecoderState]:
    """`hldm.generation.chunk.write_bytes`."""
    opening = torch.tensor(opens)
    decoder, griffin = stack_call(autoencoder.decoder, state.griffin)
    given = {"decoder": decoder, "symbol": torch.where(opening, START, state.symbol)}
    given |= dict.fromkeys(("doc_start", "resets", "starts"), opening)
    u = draw_uniform_rows(generators, autoencoder.chunking.max_bytes, opening.device)
    symbols = _write(autoencoder, u, settings, given)
    return pieces_of(symbols), DecoderState(griffin, symbols[:, -1])


def _write(autoencoder: Autoencoder, u: Tensor, settings: GenerationConfig, given: dict[str, Any]) -> Tensor:
    """Symbols (b e), up to each row's end, from u (b e) in [0, 1). given: the rest of `Writing`, by name."""
    rows, events = u.shape
    emitted = torch.full((rows, events), END_OF_CHUNK)
    call = struct("write.cpp", "Writing")(
        rows=rows,
        events=events,
        temperature=settings.decoder_temperature,
        top_p=settings.top_p,
        floor=autoencoder.byte_floor,
        u=u,
        emitted=emitted,
        **given,
        **_parameters(autoencoder),
    )
    run("hldm_write", call)
    return emitted
