"""The latent of a chunk just written and the trunk's step after it, in a single call of C++.

What `Autoencoder.close_chunk` does in torch, to rounding; call only where `can_close`. Like `hldm.kernels.stack`, this
reads the parameters where they are.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from hldm.kernels.library import library
from hldm.kernels.stack import StackCall, is_plain, kernels_can_compute, stack_call, stack_of
from hldm.model.autoencoder import Autoencoder
from hldm.model.griffin import GriffinState
from hldm.model.state import EncoderState

_SIZES = ("rows", "bytes", "d", "k", "z", "threads")
_TENSORS = (
    *("inner", "inner_bias", "place", "outer", "outer_bias", "mean", "deviation"),
    *("features", "length", "opens", "feature", "known", "latents"),
)


class _Closing(ctypes.Structure):
    """`Closing` of hldm/kernels/cpp/close.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        ("trunk", StackCall),
        ("to_trunk", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    ]


def _parameters(autoencoder: Autoencoder) -> dict[str, Tensor]:
    """What the kernel reads of the readout, by the names in `_Closing`."""
    normaliser = autoencoder.normaliser
    read: Any = autoencoder.to_latent  # Any: one of two readouts
    return {
        "inner": read.inner.weight,
        "inner_bias": read.inner.bias,
        "place": read.place.weight,
        "outer": read.outer.weight,
        "outer_bias": read.outer.bias,
        "mean": normaliser.mean,
        "deviation": normaliser.deviation,
    }


def can_close(autoencoder: Autoencoder, rows: int) -> bool:
    """Whether the kernel does what the modules would, for so many rows."""
    if not kernels_can_compute() or autoencoder.settings.pooling != "mean":
        return False
    parameters = list(_parameters(autoencoder).values())
    if autoencoder.settings.trunk_layers:
        trunk = autoencoder.trunk
        if stack_of(trunk, trunk.initial_state(rows), rows) is None:
            return False
        parameters += [autoencoder.to_trunk.weight, autoencoder.to_trunk.bias]
    return all(map(is_plain, parameters))


def close_chunk(
    autoencoder: Autoencoder,
    y: Tensor,
    griffin: GriffinState,
    length: Tensor,
    opens: Tensor,
    state: EncoderState,
) -> tuple[Tensor, EncoderState]:
    """`Autoencoder.close_chunk` of float32 features y (b l d); state: left as it is."""
    kernels, (rows, bytes_, d) = library(), y.shape
    assert kernels is not None and length.shape == (rows,) and opens.shape == (rows, 1) and is_plain(y)
    to_trunk = autoencoder.to_trunk if autoencoder.settings.trunk_layers else None
    tensors = _parameters(autoencoder) | {
        "features": y,
        "length": length.contiguous(),
        "opens": opens.contiguous(),
        "feature": y.new_empty(rows, d),
        "latents": y.new_empty(rows, autoencoder.latent_dim),
    }
    if to_trunk is not None:
        tensors["known"] = y.new_empty(rows, to_trunk.out_features)
    call = _Closing(
        rows=rows,
        bytes=bytes_,
        d=d,
        k=len(tensors["inner"]),
        z=autoencoder.latent_dim,
        threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    kept: list[Any] = []  # what the call points to, alive until it returns
    trunk = state.trunk
    if to_trunk is not None:
        linear = (ctypes.c_void_p * 2)(to_trunk.weight.data_ptr(), to_trunk.bias.data_ptr())
        call.to_trunk = ctypes.addressof(linear)
        call.trunk, trunk = stack_call(autoencoder.trunk, trunk, rows, kept)
    kernels.hldm_close(ctypes.byref(call))
    feature = tensors["feature"]
    known = tensors.get("known", feature)
    return tensors["latents"][:, None], EncoderState(griffin, feature, trunk, known)
