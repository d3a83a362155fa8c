"""All symbols of a chunk for a whole batch in a single call of C++: decoder, draw and encoder in turns.

What `hldm.generation.chunk` does event by event in torch, to rounding; it asks `can_write` first. Like `hldm.kernels.stack`, this reads
the parameters where they are.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hldm.kernels.library import library
from hldm.kernels.stack import StackCall, is_plain, kernels_can_compute, stack_call, stack_of
from hldm.text.bytes import END_OF_CHUNK

_TENSORS = (
    *("write", "known", "inner", "place", "outer", "outer_bias"),
    *("outputs", "outputs_bias", "read", "from_text", "from_text_bias", "u"),
    *("doc_start", "resets", "starts", "symbol", "feature", "emitted", "features"),
)


class _Writing(ctypes.Structure):
    """`Writing` of hldm/kernels/cpp/write.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "events", "places", "threads")),
        *((name, ctypes.c_double) for name in ("temperature", "top_p")),
        ("decoder", StackCall),
        ("encoder", StackCall),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    ]


class Emitted(NamedTuple):
    """What a call wrote, and the states after it."""

    symbols: Tensor  # (b e) END_OF_CHUNK after a row's end
    features: (
        Tensor | None
    )  # (b e-1 w) the encoder's, at each byte; None where the decoder does not read text
    encoder: Any  # states, as `Griffin.initial_state` gives them: after the last byte
    decoder: Any  # after the last symbol


def _parameters(autoencoder: Any) -> dict[str, Tensor]:
    """The parameters outside of the stacks, by their names in `_Writing`."""
    found = {
        "write": autoencoder.write.weight,
        "outputs": autoencoder.outputs.weight,
        "outputs_bias": autoencoder.outputs.bias,
    }
    if autoencoder.latent_dim:
        read = autoencoder.from_latent
        found |= {"place": read.place.weight, "outer": read.outer.weight, "outer_bias": read.outer.bias}
    if autoencoder.latent_dim and autoencoder.settings.reads_text:
        found["read"] = autoencoder.read.weight
        found["from_text"] = autoencoder.from_text.weight
        found["from_text_bias"] = autoencoder.from_text.bias
    return found


def can_write(autoencoder: Any, encoder: Any, decoder: Any, rows: int) -> bool:
    """Whether `write_events` does what the modules themselves would, from these states of encoder and decoder."""
    if not kernels_can_compute() or stack_of(autoencoder.decoder, decoder, rows) is None:
        return False
    parameters = _parameters(autoencoder)
    if "read" in parameters and stack_of(autoencoder.encoder, encoder, rows) is None:
        return False
    return all(map(is_plain, parameters.values()))


def write_events(
    autoencoder: Any,
    latent: Tensor | None,
    known: Tensor | None,
    u: Tensor,
    symbol: Tensor,
    feature: Tensor | None,
    encoder: Any,
    decoder: Any,
    *,
    doc_start: Tensor,
    resets: Tensor,
    starts: Tensor,
    temperature: float,
    top_p: float,
) -> Emitted:
    """Write until a row's end symbol, e events at most; call only where `can_write`.

    latent: (b z) of the chunk, None for the twin, which writes no end of one
    known: (b d) what the trunk tells of the text before, if there is one;  u: (b e) in [0, 1)
    symbol: (b) before the first event;  feature: (b w) of the encoder at the byte before, where text is read
    doc_start, resets, starts: (b) bool of the first event: opens a document; resets the decoder; starts its unit
    encoder, decoder: states, left as they are
    """
    kernels, (rows, events) = library(), u.shape
    assert kernels is not None
    parameters = _parameters(autoencoder)
    reads = "read" in parameters
    given: dict[str, Tensor | None] = {
        **parameters,
        "known": None if known is None else known.float(),
        "inner": None if latent is None else autoencoder.from_latent.inner(latent).float(),
        "u": u.float(),
        "doc_start": doc_start,
        "resets": resets,
        "starts": starts,
        "symbol": symbol,
        "feature": feature.clone() if feature is not None and reads else None,
        "emitted": torch.full((rows, events), END_OF_CHUNK),
        "features": u.new_zeros(rows, events - 1, autoencoder.encoder.config.width) if reads else None,
    }
    tensors = {name: tensor.contiguous() for name, tensor in given.items() if tensor is not None}
    call = _Writing(
        rows=rows,
        events=events,
        places=0 if latent is None else autoencoder.from_latent.inner.out_features,
        threads=torch.get_num_threads(),
        temperature=temperature,
        top_p=top_p,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    kept: list[Any] = []  # what the call points to, alive until it returns
    call.decoder, decoder = stack_call(autoencoder.decoder, decoder, rows, kept)
    if reads:
        call.encoder, encoder = stack_call(autoencoder.encoder, encoder, rows, kept)
    kernels.hldm_write(ctypes.byref(call))
    return Emitted(tensors["emitted"], tensors.get("features"), encoder, decoder)
