"""The C++ kernels for training as operators of torch, for the autograd functions of `hldm.kernels.scan` and
`hldm.kernels.derivatives`.

An operator is a function that allocates what it returns; the kernel of its name fills it. torch.compile sees through
them. An autograd function that calls such an operator costs 48 us forward and backward on a few numbers;
torch.library.custom_op with its own register_autograd 78 us (measured, one CPU core). Ask `available` first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hldm.kernels.library import library

_LIBRARY = torch.library.Library("hldm", "DEF")
_FLOATS: dict[torch.dtype, Any] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
ROWS_A_BLOCK = 64  # whose sums over rows the kernels return apart; hldm/kernels/cpp/rows.cpp has it, too


def available(x: Tensor) -> bool:
    """Whether the operators can take x and what comes with it: on the CPU, in float32 or float64."""
    return x.device.type == "cpu" and x.dtype in _FLOATS and _has_library()


@torch.compiler.assume_constant_result
def _has_library() -> bool:
    return library() is not None


def _operator(
    sizes: Callable[..., Sequence[int]],
    *,
    mutates: Sequence[str] = (),
    within: Callable[..., Sequence[tuple[Tensor, int, int]]] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function that allocates what it returns into the operator hldm::<its name>.

    The function itself is the operator on tensors without numbers. On a CPU the kernel of its name is called with the
    tensors given, those returned, the numbers given that are no integers, sizes, and as many threads as torch has.

    sizes, within: of the same arguments, the kernel's integers, and index tensors with the least and the end of what
    they may hold: kernels go where they are told
    """

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__

        def call(*arguments: Tensor | float | None) -> Any:
            for bounds in within(*arguments) if within else ():
                _check_range(*bounds)
            returned = function(*arguments)
            outputs = returned if isinstance(returned, tuple) else (returned,)
            inputs = [x.contiguous() if isinstance(x, Tensor) else x for x in arguments]
            tensors = [x for x in (*inputs, *outputs) if x is None or isinstance(x, Tensor)]
            dtype = outputs[0].dtype
            assert all(x is None or x.dtype in (dtype, torch.int64) for x in tensors)
            floats = [x for x in arguments if isinstance(x, float)]
            integers = sizes(*arguments)
            kernel = _kernel(name, dtype, len(tensors), len(floats), len(integers))
            addresses = (None if x is None else x.data_ptr() for x in tensors)
            kernel(*addresses, *floats, *integers, torch.get_num_threads())
            return returned

        _LIBRARY.define(torch.library.infer_schema(function, op_name=name, mutates_args=mutates))
        _LIBRARY.impl(name, call, "CPU")
        torch.library.register_fake(f"hldm::{name}", function, lib=_LIBRARY)
        return getattr(torch.ops.hldm, name).default

    return register


@cache
def _kernel(name: str, dtype: torch.dtype, tensors: int, floats: int, integers: int) -> Any:
    kinds = [ctypes.c_void_p] * tensors + [_FLOATS[dtype]] * floats + [ctypes.c_int64] * (integers + 1)
    compiled, suffix = library(), str(dtype).removeprefix("torch.")
    assert compiled is not None
    return ctypes.CFUNCTYPE(None, *kinds).in_dll(compiled, f"hldm_{name}_{suffix}")


def _check_range(index: Tensor, least: int, n: int) -> None:
    """Raise IndexError where an index is below least, or n or more. 10 us for 2,000 of them."""
    if index.numel():
        low, high = (int(x) for x in torch.aminmax(index))
        if low < least or high >= n:
            raise IndexError(f"an index must lie within {least}..{n - 1}, got {low}..{high}")


# ---- h_t = a_t h_{t-1} + b_t


@_operator(lambda a, b, h0: b.shape)
def scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """All states (b t d) of the recurrence; a, b (b t d), h0 (b d)."""
    return b.new_empty(b.shape)


@_operator(lambda a, h0, h, dh, dh_last: h.shape)
def scan_back(a: Tensor, h0: Tensor, h: Tensor, dh: Tensor, dh_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and h0, from those of all states and of the last one."""
    return h.new_empty(h.shape), h.new_empty(h.shape), h0.new_empty(h0.shape)


# ---- the RG-LRU after the products of its gates


def _gate_sizes(x: Tensor, gates: Tensor, *_: Any) -> tuple[int, ...]:
    return *x.shape[:2], len(gates), gates.shape[2] // 2


@_operator(_gate_sizes, mutates=("gates",))
def gated_scan(
    x: Tensor, gates: Tensor, bias: Tensor, log_radius: Tensor, reset: Tensor, h0: Tensor
) -> Tensor:
    """All states (b t d) of the RG-LRU; `hldm.model.ops.rg_lru` says what they are.

    x (b t d), gates (h bt 2w): logits without bias, replaced by the gates; bias (2 h w), log_radius (d),
    reset (b t) 0 or minus infinity, h0 (b d)
    """
    assert gates.is_contiguous()
    return x.new_empty(x.shape)


@_operator(_gate_sizes)
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
    dx, dgates, dbias = x.new_empty(x.shape), gates.new_empty(gates.shape), x.new_empty(len(x), 2, x.shape[2])
    return dx, dgates, dbias, h0.new_empty(h0.shape), h0.new_empty(h0.shape)


# ---- the causal convolution


@_operator(lambda x, taps, weight, bias, inside: (*x.shape, len(weight)))
def conv(x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, inside: Tensor) -> Tensor:
    """`hldm.model.ops.causal_conv`; arguments as there."""
    return x.new_empty(x.shape)


@_operator(lambda x, taps, weight, inside, dy: (*x.shape, len(weight)))
def conv_back(
    x: Tensor, taps: Tensor, weight: Tensor, inside: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and taps, and by row those of weight (b k d) and bias (b d)."""
    k, d = weight.shape
    return x.new_empty(x.shape), taps.new_empty(taps.shape), x.new_empty(len(x), k, d), x.new_empty(len(x), d)


# ---- the gate of the MLP


@_operator(lambda gate, x: [x.numel()])
def gelu_gate(gate: Tensor, x: Tensor) -> Tensor:
    """gelu(gate) x, gelu in its tanh form; shapes are the same."""
    return x.new_empty(x.shape)


@_operator(lambda gate, x, dy: [x.numel()])
def gelu_gate_back(gate: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and x."""
    return x.new_empty(x.shape), x.new_empty(x.shape)


# ---- the norm of rows


def _row_sizes(x: Tensor, *_: Any) -> tuple[int, int]:
    return x.shape[:-1].numel(), x.shape[-1]


@_operator(_row_sizes)
def rms_norm(x: Tensor, branch: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """s = x + branch, y = s / sqrt(mean s^2 + eps) (1 + scale), and what s was multiplied with.

    Without a branch s is x, and no numbers are returned for it. x, branch (... d), scale (d) -> (... d), (... d), (...)
    """
    total = x.new_empty(0 if branch is None else x.shape)
    return total, x.new_empty(x.shape), x.new_empty(x.shape[:-1])


@_operator(_row_sizes)
def rms_norm_back(
    x: Tensor, inverse: Tensor, scale: Tensor, dy: Tensor, dx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x, added to what else reaches it, and by block of rows that of scale."""
    return x.new_empty(x.shape), x.new_empty(-(-inverse.numel() // ROWS_A_BLOCK), x.shape[-1])


# ---- softmax


@_operator(lambda x, target: x.shape)
def softmax_nats(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(x)_target of rows x (n v), target (n), and the logarithms of the sums."""
    return x.new_empty(len(x)), x.new_empty(len(x))


@_operator(lambda x, target, log_sum, dnats: x.shape)
def softmax_nats_back(x: Tensor, target: Tensor, log_sum: Tensor, dnats: Tensor) -> Tensor:
    """Gradient of x."""
    return x.new_empty(x.shape)


# ---- rows by their number


@_operator(
    lambda x, index, table, place: (*x.shape[:2], index.shape[1], x.shape[2]),
    within=lambda x, index, table, place: [(index, 0, x.shape[1]), (place, 0, len(table))],
)
def placed_gelu(x: Tensor, index: Tensor, table: Tensor, place: Tensor) -> Tensor:
    """gelu(x_index + table_place), exact: x (b n d), index and place (b t), table (k d) -> (b t d)."""
    return x.new_empty(*index.shape, x.shape[2])


@_operator(lambda x, index, table, place, dy: (*x.shape[:2], *dy.shape[1:], len(table)))
def placed_gelu_back(
    x: Tensor, index: Tensor, table: Tensor, place: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and by row that of the table (b k d)."""
    return x.new_empty(x.shape), x.new_empty(len(x), *table.shape)


@_operator(
    lambda x, index: (*x.shape[:2], index.shape[1], x.shape[2]),
    within=lambda x, index: [(index, -1, x.shape[1])],
)
def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (b n d) at index (b t), 0 where that is -1. (b t d)."""
    return x.new_empty(*index.shape, x.shape[2])


@_operator(
    lambda y, index, n: (len(y), n, *y.shape[1:]),
    within=lambda y, index, n: [(index, -1, n)],
)
def add_rows(y: Tensor, index: Tensor, n: int) -> Tensor:
    """Sums of the y (b t d) of one index (b t) below n, without those where it is -1. (b n d)."""
    return y.new_empty(len(y), n, y.shape[2])
