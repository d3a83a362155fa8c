"""The C++ kernels for training as operators of torch, for the autograd functions of `hldm.kernels.scan` and
`hldm.kernels.derivatives`.

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

from hldm.kernels.library import library

_LIBRARY = torch.library.Library("hldm", "DEF")
_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}
ROWS_A_BLOCK = 64  # whose sums over rows the kernels return apart; hldm/kernels/cpp/rows.cpp has it, too


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


def _call(name: str, *arguments: Tensor | float | None) -> None:
    """The kernel with as many threads as torch has.

    arguments: contiguous tensors of one dtype, or None for one that is not there; int64 tensors of indices; numbers
    """
    first = arguments[0]
    assert isinstance(first, Tensor)
    kinds: list[type] = []
    values: list[float | None] = []
    for x in arguments:
        if isinstance(x, Tensor):
            assert x.dtype in (first.dtype, torch.int64) and x.is_contiguous()
        kinds.append(Tensor if x is None or isinstance(x, Tensor) else type(x))
        values.append(x.data_ptr() if isinstance(x, Tensor) else x)
    _function(name, first.dtype, (*kinds, int))(*values, torch.get_num_threads())


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
    """All states (b t d) of the RG-LRU; `hldm.model.ops.rg_lru` says what they are.

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
    """`hldm.model.ops.causal_conv`; arguments as there."""
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


# ---- the norm of rows


@_operator(
    "rms_norm(Tensor x, Tensor scale, float eps) -> (Tensor, Tensor)",
    lambda x, scale, eps: (x.new_empty(x.shape), x.new_empty(x.shape[:-1])),
)
def rms_norm(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x / sqrt(mean x^2 + eps) (1 + scale) of rows x (... d), scale (d); and what x was multiplied with (...)."""
    y, inverse = x.new_empty(x.shape), x.new_empty(x.shape[:-1])
    _call("rms_norm", x.contiguous(), None, scale.contiguous(), None, y, inverse, eps, *_rows_of(x))
    return y, inverse


@_operator(
    "add_rms_norm(Tensor x, Tensor branch, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    lambda x, branch, scale, eps: (x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1])),
)
def add_rms_norm(x: Tensor, branch: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + branch, and `rms_norm` of it."""
    total, y, inverse = x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1])
    read = (part.contiguous() for part in (x, branch, scale))
    _call("rms_norm", *read, total, y, inverse, eps, *_rows_of(x))
    return total, y, inverse


@_operator(
    "rms_norm_back(Tensor x, Tensor inverse, Tensor scale, Tensor dy, Tensor? dx) -> (Tensor, Tensor)",
    lambda x, inverse, scale, dy, dx: (
        x.new_empty(x.shape),
        x.new_empty(-(-inverse.numel() // ROWS_A_BLOCK), x.shape[-1]),
    ),
)
def rms_norm_back(
    x: Tensor, inverse: Tensor, scale: Tensor, dy: Tensor, dx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x, added to what else reaches it, and by block of rows that of scale."""
    n, d = _rows_of(x)
    total, dscale = x.new_empty(x.shape), x.new_empty(-(-n // ROWS_A_BLOCK), d)
    others = None if dx is None else dx.contiguous()
    read = (part.contiguous() for part in (x, inverse, scale, dy))
    _call("rms_norm_back", *read, others, total, dscale, n, d)
    return total, dscale


def _rows_of(x: Tensor) -> tuple[int, int]:
    return x.shape[:-1].numel(), x.shape[-1]


# ---- softmax


@_operator(
    "softmax_nats(Tensor x, Tensor target) -> (Tensor, Tensor)",
    lambda x, target: (x.new_empty(len(x)), x.new_empty(len(x))),
)
def softmax_nats(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(x)_target of rows x (n v), target (n), and the logarithms of the sums."""
    nats, log_sum = x.new_empty(len(x)), x.new_empty(len(x))
    _call("softmax_nats", x.contiguous(), target.contiguous(), nats, log_sum, *x.shape)
    return nats, log_sum


@_operator(
    "softmax_nats_back(Tensor x, Tensor target, Tensor log_sum, Tensor dnats) -> Tensor",
    lambda x, target, log_sum, dnats: x.new_empty(x.shape),
)
def softmax_nats_back(x: Tensor, target: Tensor, log_sum: Tensor, dnats: Tensor) -> Tensor:
    """Gradient of x."""
    dx = x.new_empty(x.shape)
    read = (part.contiguous() for part in (x, target, log_sum, dnats))
    _call("softmax_nats_back", *read, dx, *x.shape)
    return dx


# ---- rows by their number


def _check_range(index: Tensor, least: int, n: int) -> None:
    """Kernels go where they are told: raise IndexError rather than leave a tensor. 10 us for 2,000 of them."""
    if index.numel():
        low, high = (int(x) for x in torch.aminmax(index))
        if low < least or high >= n:
            raise IndexError(f"an index must lie within {least}..{n - 1}, got {low}..{high}")


@_operator(
    "placed_gelu(Tensor x, Tensor index, Tensor table, Tensor place) -> Tensor",
    lambda x, index, table, place: x.new_empty(*index.shape, x.shape[2]),
)
def placed_gelu(x: Tensor, index: Tensor, table: Tensor, place: Tensor) -> Tensor:
    """gelu(x_index + table_place), exact: x (b n d), index and place (b t), table (k d) -> (b t d)."""
    _check_range(index, 0, x.shape[1])
    _check_range(place, 0, len(table))
    y = x.new_empty(*index.shape, x.shape[2])
    read = (part.contiguous() for part in (x, index, table, place))
    _call("placed_gelu", *read, y, *x.shape[:2], *y.shape[1:])
    return y


@_operator(
    "placed_gelu_back(Tensor x, Tensor index, Tensor table, Tensor place, Tensor dy) -> (Tensor, Tensor)",
    lambda x, index, table, place, dy: (x.new_empty(x.shape), x.new_empty(len(x), *table.shape)),
)
def placed_gelu_back(
    x: Tensor, index: Tensor, table: Tensor, place: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and by row that of the table (b k d)."""
    dx, dtable = x.new_empty(x.shape), x.new_empty(len(x), *table.shape)
    read = (part.contiguous() for part in (x, index, table, place, dy))
    _call("placed_gelu_back", *read, dx, dtable, *x.shape[:2], *dy.shape[1:], len(table))
    return dx, dtable


@_operator(
    "take_rows(Tensor x, Tensor index) -> Tensor",
    lambda x, index: x.new_empty(*index.shape, x.shape[2]),
)
def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (b n d) at index (b t), 0 where that is -1. (b t d)."""
    _check_range(index, -1, x.shape[1])
    y = x.new_empty(*index.shape, x.shape[2])
    _call("take_rows", x.contiguous(), index.contiguous(), y, *x.shape[:2], *y.shape[1:])
    return y


@_operator(
    "add_rows(Tensor y, Tensor index, int n) -> Tensor",
    lambda y, index, n: y.new_empty(len(y), n, y.shape[2]),
)
def add_rows(y: Tensor, index: Tensor, n: int) -> Tensor:
    """Sums of the y (b t d) of one index (b t) below n, without those where it is -1. (b n d)."""
    _check_range(index, -1, n)
    x = y.new_empty(len(y), n, y.shape[2])
    _call("add_rows", y.contiguous(), index.contiguous(), x, len(y), n, *y.shape[1:])
    return x
