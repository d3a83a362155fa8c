"""Faster forms of `hldm.model.ops`: autograd functions with their derivatives written out, each way one pass in C++.

Left to autograd these elementwise chains cost a CPU nearly as much as the matrix products; so, 0.6 of that
(measured, width 128). All but the convolution decline where there are no kernels: written out in torch, norm and gates
save 2 % of a training step. While torch.compile traces they decline, too: it sees the plain formulas.
tests/kernels/test_forms.py holds them to these.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hldm.kernels.library import library
from hldm.model import ops

_FLOATS: dict[torch.dtype, Any] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
# Sums over rows come apart for blocks of so many; hldm/kernels/cpp/derivatives.cpp has the number, too.
ROWS_A_BLOCK = 64


def _can_take(*tensors: Tensor) -> bool:
    """Whether the kernels can take tensors: on the CPU, all in float32 or all in float64."""
    if torch.compiler.is_compiling() or len({x.dtype for x in tensors}) > 1:
        return False
    return tensors[0].device.type == "cpu" and tensors[0].dtype in _FLOATS and library() is not None


def _run(name: str, tensors: Sequence[Tensor | None], sizes: Sequence[int], *floats: float) -> None:
    """A kernel of hldm/kernels/cpp/derivatives.cpp: its pointers, numbers and sizes, in its order."""
    dense = [None if x is None else x.contiguous() for x in tensors]  # outputs are so already
    first = dense[0]
    assert first is not None
    kernel = _kernel(name, first.dtype, len(dense), len(floats), len(sizes))
    addresses = (None if x is None else x.data_ptr() for x in dense)
    kernel(*addresses, *floats, *sizes, torch.get_num_threads())


@cache
def _kernel(name: str, dtype: torch.dtype, tensors: int, floats: int, integers: int) -> Any:
    kinds = [ctypes.c_void_p] * tensors + [_FLOATS[dtype]] * floats + [ctypes.c_int64] * (integers + 1)
    compiled, suffix = library(), str(dtype).removeprefix("torch.")
    assert compiled is not None
    return ctypes.CFUNCTYPE(None, *kinds).in_dll(compiled, f"hldm_{name}_{suffix}")


# ---------------------------------------------------------------- norm


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return RMSNormFunction.apply(x, None, scale, eps)[1] if _can_take(x, scale) else NotImplemented


def add_rms_norm(x: Tensor, branch: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return RMSNormFunction.apply(x, branch, scale, eps) if _can_take(x, branch, scale) else NotImplemented


class RMSNormFunction(torch.autograd.Function):
    """The sum of x and branch, None without a branch, and the norm of it.

    The sum goes on, too: what reaches it in the backward pass is added in the same pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, scale: Tensor, eps: float
    ) -> tuple[Tensor | None, Tensor]:
        total = x.new_empty(0 if branch is None else x.shape)
        y, inverse = x.new_empty(x.shape), x.new_empty(x.shape[:-1])
        _run("rms_norm", [x, branch, scale, total, y, inverse], [inverse.numel(), x.shape[-1]], eps)
        ctx.save_for_backward(x if branch is None else total, inverse, scale)
        ctx.set_materialize_grads(False)  # None where nobody reads the sum, or the norm
        return None if branch is None else total, y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dtotal: Tensor | None, dy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if dy is None:
            return dtotal, dtotal, None, None
        x, inverse, scale = ctx.saved_tensors
        n, d = inverse.numel(), x.shape[-1]
        dx, dscale = x.new_empty(x.shape), x.new_empty(-(-n // ROWS_A_BLOCK), d)
        _run("rms_norm_back", [x, inverse, scale, dy, dtotal, dx, dscale], [n, d])
        return dx, dx if ctx.needs_input_grad[1] else None, dscale.sum(0), None


# ---------------------------------------------------------------- gate


def gelu_gate(gate: Tensor, x: Tensor) -> Tensor:
    return GeluGateFunction.apply(gate, x) if _can_take(gate, x) else NotImplemented


class GeluGateFunction(torch.autograd.Function):
    """gelu(gate) x; gelu is worked out once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        y = x.new_empty(x.shape)
        _run("gelu_gate", [gate, x, y], [x.numel()])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, x = ctx.saved_tensors
        dgate, dx = x.new_empty(x.shape), x.new_empty(x.shape)
        _run("gelu_gate_back", [gate, x, dy, dgate, dx], [x.numel()])
        return dgate, dx


# ---------------------------------------------------------------- convolution


def causal_conv(x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, inside: Tensor) -> Tensor:
    t = x.shape[1]
    if t == 1:
        return NotImplemented  # the plain formula takes fewer steps
    if _can_take(x, taps, weight, bias, inside):
        return CausalConvFunction.apply(x, taps, weight, bias, inside)
    # tap by tap: a fifth of the plain formula's time, which holds all windows at once (measured)
    extended = torch.cat([taps, x], dim=1)
    y = torch.addcmul(bias, extended[:, -t:], weight[-1])
    for i in range(len(weight) - 1):
        y = torch.addcmul(y, extended[:, i : i + t] * inside[..., i : i + 1], weight[i])
    return y


class CausalConvFunction(torch.autograd.Function):
    """The convolution in one pass each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps, weight, inside)
        y = x.new_empty(x.shape)
        _run("conv", [x, taps, weight, bias, inside, y], [*x.shape, len(weight)])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, taps, weight, inside = ctx.saved_tensors
        b, t, d = x.shape
        dx, dtaps = x.new_empty(x.shape), taps.new_empty(taps.shape)
        dweight, dbias = x.new_empty(b, *weight.shape), x.new_empty(b, d)  # by row
        _run("conv_back", [x, taps, weight, inside, dy, dx, dtaps, dweight, dbias], [b, t, d, len(weight)])
        return dx, dtaps, dweight.sum(0), dbias.sum(0), None


# ---------------------------------------------------------------- RG-LRU


def rg_lru(
    x: Tensor, weight: Tensor, bias: Tensor, log_radius: Tensor, reset: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor]:
    if _can_take(x, weight, bias, log_radius, reset, h0):
        return GatedScanFunction.apply(x, weight, bias, log_radius, reset, h0)
    return NotImplemented


class GatedScanFunction(torch.autograd.Function):
    """The RG-LRU whole.

    Keeps the gates and the states; the decays are worked out once more in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, log_radius: Tensor, reset: Tensor, h0: Tensor
    ) -> tuple[Tensor, Tensor]:
        h, w, _ = weight.shape
        # (h bt 2w): logits, which the kernel turns into the gates themselves
        gates = torch.bmm(x.reshape(-1, h, w).transpose(0, 1), weight)
        states = x.new_empty(x.shape)
        _run("gated_scan", [x, gates, bias, log_radius, reset, h0, states], [*x.shape[:2], h, w])
        ctx.save_for_backward(x, weight, log_radius, reset, h0, gates, states)
        return states, states[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dstates: Tensor, dlast: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None, Tensor]:
        x, weight, log_radius, reset, h0, gates, states = ctx.saved_tensors
        h, w, _ = weight.shape
        dx, dgates, dbias = x.new_empty(x.shape), gates.new_empty(gates.shape), x.new_empty(len(x), 2 * h * w)
        dlog_radius, dh0 = h0.new_empty(h0.shape), h0.new_empty(h0.shape)
        given = [x, gates, log_radius, reset, h0, states, dstates, dlast]
        # sums over time by row; dx without what goes through gates
        returned = [dx, dgates, dbias, dlog_radius, dh0]
        sizes = [*x.shape[:2], h, w]
        _run("gated_scan_back", [*given, *returned], sizes, 0.5 / ops.MAX_SQRT_GRADIENT)
        dweight = torch.bmm(x.reshape(-1, h, w).permute(1, 2, 0), dgates)
        dx.view(-1, h, w).add_(torch.bmm(dgates, weight.mT).transpose(0, 1))
        return dx, dweight, dbias.sum(0).view(2, h, w), dlog_radius.sum(0), None, dh0
