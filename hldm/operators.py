"""The C++ kernels for training as operators of torch, for the autograd functions of `hldm.scan` and `hldm.derivatives`.

Registered with shapes and dtypes of what they return, so that torch.compile sees through them. An autograd function
that calls such an operator costs 48 us forward and backward on a few numbers; torch.library.custom_op with its own
register_autograd 78 us (measured, one CPU core). Ask `available` first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hldm.kernels import library

_LIBRARY = torch.library.Library("hldm", "DEF")
_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}


def available(x: Tensor) -> bool:
    """Whether the operators can take x and what comes with it: on the CPU, in float32 or float64."""
    return x.device.type == "cpu" and x.dtype in _SUFFIX and _has_library()


@torch.compiler.assume_constant_result
def _has_library() -> bool:
    return library() is not None


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as the CPU's implementation of hldm::<schema>, and return the operator.

    fake: the same function on tensors without numbers
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"hldm::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.hldm, name).default

    return register


@cache
def _function(name: str, dtype: torch.dtype, arguments: tuple[type, ...]) -> Any:
    function = getattr(library(), f"hldm_{name}_{_SUFFIX[dtype]}")
    kinds = {Tensor: ctypes.c_void_p, float: ctypes.c_double, int: ctypes.c_int64}
    function.argtypes, function.restype = [kinds[kind] for kind in arguments], None
    return function


def _call(name: str, *arguments: Tensor | float) -> None:
    """The kernel on contiguous tensors of one dtype and on numbers, with as many threads as torch has."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    assert all(x.dtype == first.dtype and x.is_contiguous() for x in arguments if isinstance(x, Tensor))
    function = _function(
        name, first.dtype, (*(Tensor if isinstance(x, Tensor) else type(x) for x in arguments), int)
    )
    function(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments), torch.get_num_threads())


# ---- h_t = a_t h_{t-1} + b_t


@_operator("scan(Tensor a, Tensor b, Tensor h0) -> Tensor", lambda a, b, h0: torch.empty_like(b))
def scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """All states (b t d) of the recurrence; a, b (b t d), h0 (b d)."""
    h = torch.empty(b.shape, dtype=b.dtype)
    _call("scan", a.contiguous(), b.contiguous(), h0.contiguous(), h, *b.shape)
    return h


@_operator(
    "scan_back(Tensor a, Tensor h0, Tensor h, Tensor dh, Tensor dh_last) -> (Tensor, Tensor, Tensor)",
    lambda a, h0, h, dh, dh_last: (h.new_empty(h.shape), h.new_empty(h.shape), h0.new_empty(h0.shape)),
)
def scan_back(a: Tensor, h0: Tensor, h: Tensor, dh: Tensor, dh_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and h0, from those of all states and of the last one."""
    da, db, dh0 = torch.empty_like(h), torch.empty_like(h), h0.new_empty(h0.shape)
    read = (x.contiguous() for x in (a, h0, h, dh, dh_last))
    _call("scan_back", *read, da, db, dh0, *h.shape)
    return da, db, dh0


# ---- the RG-LRU after the products of its gates


@_operator(
    "gated_scan(Tensor x, Tensor(a!) gates, Tensor bias, Tensor log_radius, Tensor reset, Tensor h0) -> Tensor",
    lambda x, gates, bias, log_radius, reset, h0: x.new_empty(x.shape),
)
def gated_scan(
    x: Tensor, gates: Tensor, bias: Tensor, log_radius: Tensor, reset: Tensor, h0: Tensor
) -> Tensor:
    """All states (b t d) of the RG-LRU; `hldm.derivatives.RGLRUFunction` says what they are.

    x (b t d), gates (h bt 2w): logits without bias, replaced by the gates; bias (2 h w), log_radius (d),
    reset (b t) 0 or minus infinity, h0 (b d)
    """
    h = torch.empty(x.shape, dtype=x.dtype)
    b, t, _ = x.shape
    heads, _, twice = gates.shape
    read = (part.contiguous() for part in (bias, log_radius, reset, h0))
    _call("gated_scan", x.contiguous(), gates, *read, h, b, t, heads, twice // 2)
    return h


@_operator(
    "gated_scan_back(Tensor x, Tensor gates, Tensor log_radius, Tensor reset, Tensor h0, Tensor h, Tensor dh, "
    "Tensor dh_last, float least) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, gates, log_radius, reset, h0, h, dh, dh_last, least: (
        x.new_empty(x.shape),
        gates.new_empty(gates.shape),
        x.new_empty(x.shape[0], 2, x.shape[2]),
        h0.new_empty(h0.shape),
        h0.new_empty(h0.shape),
    ),
)
def gated_scan_back(
    x: Tensor,
    gates: Tensor,
    log_radius: Tensor,
    reset: Tensor,
    h0: Tensor,
    h: Tensor,
    dh: Tensor,
    dh_last: Tensor,
    least: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x less what goes through the logits, of the logits, and by row of bias (b 2 d), log_radius and h0.

    gates: as `gated_scan` left them;  least: the least multiplier that a gradient is divided by
    """
    b, t, d = x.shape
    heads, _, twice = gates.shape
    dx, dgates, dbias = h.new_empty(h.shape), torch.empty_like(gates), h.new_empty(b, 2, d)
    dlog_radius, dh0 = h.new_empty(b, d), h.new_empty(b, d)
    read = (part.contiguous() for part in (x, gates, log_radius, reset, h0, h, dh, dh_last))
    written = (dx, dgates, dbias, dlog_radius, dh0)
    _call("gated_scan_back", *read, *written, least, b, t, heads, twice // 2)
    return written


# ---- the causal convolution


@_operator(
    "conv(Tensor x, Tensor taps, Tensor weight, Tensor bias, Tensor inside) -> Tensor",
    lambda x, taps, weight, bias, inside: x.new_empty(x.shape),
)
def conv(x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, inside: Tensor) -> Tensor:
    """What `hldm.derivatives.CausalConvFunction` says; arguments as there."""
    y = x.new_empty(x.shape)
    _call("conv", *(part.contiguous() for part in (x, taps, weight, bias, inside)), y, *x.shape, len(weight))
    return y


@_operator(
    "conv_back(Tensor x, Tensor taps, Tensor weight, Tensor inside, Tensor dy) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, taps, weight, inside, dy: (
        x.new_empty(x.shape),
        taps.new_empty(taps.shape),
        weight.new_empty(x.shape[0], *weight.shape),
        weight.new_empty(x.shape[0], weight.shape[1]),
    ),
)
def conv_back(
    x: Tensor, taps: Tensor, weight: Tensor, inside: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and taps, and by row those of weight (b k d) and bias (b d)."""
    b, _, d = x.shape
    dx, dtaps = x.new_empty(x.shape), taps.new_empty(taps.shape)
    dweight, dbias = x.new_empty(b, len(weight), d), x.new_empty(b, d)
    read = (part.contiguous() for part in (x, taps, weight, inside, dy))
    _call("conv_back", *read, dx, dtaps, dweight, dbias, *x.shape, len(weight))
    return dx, dtaps, dweight, dbias


# ---- the gate of the MLP


@_operator("gelu_gate(Tensor gate, Tensor x) -> Tensor", lambda gate, x: x.new_empty(x.shape))
def gelu_gate(gate: Tensor, x: Tensor) -> Tensor:
    """gelu(gate) x, gelu in its tanh form; shapes are the same."""
    y = x.new_empty(x.shape)
    _call("gelu_gate", gate.contiguous(), x.contiguous(), y, x.numel())
    return y


@_operator(
    "gelu_gate_back(Tensor gate, Tensor x, Tensor dy) -> (Tensor, Tensor)",
    lambda gate, x, dy: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
def gelu_gate_back(gate: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and x."""
    dgate, dx = x.new_empty(x.shape), x.new_empty(x.shape)
    _call("gelu_gate_back", gate.contiguous(), x.contiguous(), dy.contiguous(), dgate, dx, x.numel())
    return dgate, dx
