"""All symbols of a chunk for a whole batch in a single call of C++: decoder, draw and encoder in turns.

What `hldm.generation.chunk` does event by event in torch, to rounding, by the same names.
Like `hldm.kernels.stack`, this reads the parameters where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hldm.config import GenerationConfig
from hldm.generation.chunk import Piece, Written, draw_uniform_rows, known_of_text, pieces_of
from hldm.kernels.stack import stack_call
from hldm.kernels.structs import run, struct
from hldm.model.autoencoder import Autoencoder
from hldm.model.state import DecoderState, EncoderState, GriffinState
from hldm.text.bytes import END_OF_CHUNK, START


def _parameters(autoencoder: Autoencoder) -> dict[str, Tensor]:
    """The parameters outside of the stacks, by their names in `Writing` of hldm/kernels/cpp/write.cpp."""
    found = {
        "write": autoencoder.write.weight,
        "outputs": autoencoder.outputs.weight,
        "outputs_bias": autoencoder.outputs.bias,
    }
    if autoencoder.latent_dim:
        placed = autoencoder.from_latent
        found |= {"place": placed.place.weight, "outer": placed.outer.weight, "outer_bias": placed.outer.bias}
        found["read"] = autoencoder.read.weight
    if autoencoder.latent_dim and autoencoder.settings.reads_text:
        found["from_text"] = autoencoder.from_text.weight
        found["from_text_bias"] = autoencoder.from_text.bias
    return found


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
    given = {
        "symbol": torch.full_like(opening, START, dtype=torch.long),
        "doc_start": opening,
        "resets": opening if autoencoder.settings.carry_state else always,
        "starts": always,
        "known": None if known is None else known[:, 0],
        "inner": autoencoder.from_latent.inner(latent),
        "feature": encoder.feature.clone(),
        "features": u.new_zeros(len(u), u.shape[1] - 1, encoder.feature.shape[1]),
    }
    symbols, reading, writing = _call(autoencoder, u, given, encoder.griffin, decoder.griffin, settings)
    return Written(pieces_of(symbols), given["features"], reading, writing)


def write_bytes(
    autoencoder: Autoencoder,
    state: DecoderState,
    opens: Sequence[bool],
    settings: GenerationConfig,
    generators: Sequence[torch.Generator],
) -> tuple[list[Piece], DecoderState]:
    """`hldm.generation.chunk.write_bytes`."""
    opening = torch.tensor(opens)
    given = {"symbol": torch.where(opening, START, state.symbol)}
    given |= dict.fromkeys(("doc_start", "resets", "starts"), opening)
    u = draw_uniform_rows(generators, autoencoder.chunking.max_bytes, opening.device)
    symbols, _, griffin = _call(autoencoder, u, given, (), state.griffin, settings)
    return pieces_of(symbols), DecoderState(griffin, symbols[:, -1])


def _call(
    autoencoder: Autoencoder,
    u: Tensor,
    given: Mapping[str, Tensor | None],
    encoder: GriffinState,
    decoder: GriffinState,
    settings: GenerationConfig,
) -> tuple[Tensor, GriffinState, GriffinState]:
    """Write until a row's end symbol, e events at most: symbols (b e), states of encoder and decoder after them.

    u: (b e) in [0, 1);  encoder, decoder: states, left as they are
    given, by row (b): symbol (int64) before the first event, and whether that opens a document, resets the decoder's
    state, starts the decoder's unit: doc_start, resets, starts (bool)
    but for the twin, which writes no end of a chunk and reads nothing back: known (b d) or None, added to every event;
    inner (b k) of the latent; feature (b w) of the encoder at the byte before, features (b e-1 w), both written over
    """
    rows, events = u.shape
    emitted = torch.full((rows, events), END_OF_CHUNK)
    found = {**_parameters(autoencoder), **given, "u": u, "emitted": emitted}
    tensors = {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}
    stacks = {}
    stacks["decoder"], decoder = stack_call(autoencoder.decoder, decoder, rows)
    if "inner" in tensors:
        stacks["encoder"], encoder = stack_call(autoencoder.encoder, encoder, rows)
    call = struct("write.cpp", "Writing")(
        rows=rows,
        events=events,
        places=tensors["inner"].shape[1] if "inner" in tensors else 0,
        temperature=settings.decoder_temperature,
        top_p=settings.top_p,
        **stacks,
        **tensors,
    )
    run("hldm_write", call)
    return emitted, encoder, decoder
