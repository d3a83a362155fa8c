"""The latent of a chunk just written and the trunk's step after it, in a single call of C++.

What `Autoencoder.close_chunk` does in torch, to rounding; it asks `can_close` first. Like `hldm.kernels.stack`, this reads the
parameters where they are.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hldm.kernels.library import library
from hldm.kernels.stack import StackCall, is_plain, kernels_can_compute, stack_call, stack_of

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


class Closed(NamedTuple):
    """What a chunk leaves, by row."""

    latents: Tensor  # (b z) normalised
    feature: Tensor  # (b d) of the encoder at the last byte
    trunk: Any  # state, as `Griffin.initial_state` gives it; () without a trunk
    known: Tensor  # (b w) the trunk's output; without one, the feature


def _parameters(autoencoder: Any) -> dict[str, Tensor]:
    """What the kernel reads of the readout, by the names in `_Closing`."""
    read, normaliser = autoencoder.to_latent, autoencoder.normaliser
    return {
        "inner": read.inner.weight,
        "inner_bias": read.inner.bias,
        "place": read.place.weight,
        "outer": read.outer.weight,
        "outer_bias": read.outer.bias,
        "mean": normaliser.mean,
        "deviation": normaliser.deviation,
    }


def can_close(autoencoder: Any, y: Tensor, trunk: Any) -> bool:
    """Whether `close_step` does what the modules would, from features y (b l d) and a state of the trunk."""
    if not kernels_can_compute() or len(y) == 0 or not is_plain(y):
        return False
    if autoencoder.settings.pooling != "mean":
        return False
    parameters = list(_parameters(autoencoder).values())
    if autoencoder.settings.trunk_layers:
        if stack_of(autoencoder.trunk, trunk, len(y)) is None:
            return False
        parameters += [autoencoder.to_trunk.weight, autoencoder.to_trunk.bias]
    return all(map(is_plain, parameters))


def close_step(autoencoder: Any, y: Tensor, length: Tensor, opens: Tensor, trunk: Any) -> Closed:
    """Take in one chunk a row; call only where `can_close`.

    y: (b l d) features of its bytes;  length: (b), at least 1;  opens: (b 1) bool, first chunk of a document
    trunk: its state, left as it is
    """
    kernels, (rows, bytes_, d) = library(), y.shape
    assert kernels is not None and length.shape == (rows,) and opens.shape == (rows, 1)
    read, to_trunk = autoencoder.to_latent, getattr(autoencoder, "to_trunk", None)
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
        k=read.inner.out_features,
        z=autoencoder.latent_dim,
        threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    kept: list[Any] = []
    if to_trunk is not None:
        linear = (ctypes.c_void_p * 2)(to_trunk.weight.data_ptr(), to_trunk.bias.data_ptr())
        call.to_trunk = ctypes.addressof(linear)
        call.trunk, trunk = stack_call(autoencoder.trunk, trunk, rows, kept)
    kernels.hldm_close(ctypes.byref(call))
    feature = tensors["feature"]
    return Closed(tensors["latents"], feature, trunk, tensors.get("known", feature))
