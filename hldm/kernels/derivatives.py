"""Faster forms of `hldm.model.ops`: autograd functions with their derivatives written out.

Left to autograd these elementwise chains cost a CPU nearly as much as the matrix products; so, 0.6 of that
(measured, width 128). All but the convolution decline where `hldm.kernels.operators` has no kernels: written out in
torch, norm and gates save 2 % of a training step. tests/kernels/test_forms.py holds them to the plain formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hldm.kernels import operators
from hldm.model.ops import MAX_SQRT_GRADIENT

# ---------------------------------------------------------------- norm


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    if x.dtype == scale.dtype and operators.available(x):
        return _RMSNormFunction.apply(x, None, scale, eps)[1]
    return NotImplemented


def add_rms_norm(x: Tensor, branch: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype == branch.dtype == scale.dtype and operators.available(x):
        return _RMSNormFunction.apply(x, branch, scale, eps)
    return NotImplemented


class _RMSNormFunction(torch.autograd.Function):
    """The sum of x and branch, None without a branch, and the norm of it.

    The sum goes on, too: what reaches it in the backward pass is added in the same pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, scale: Tensor, eps: float
    ) -> tuple[Tensor | None, Tensor]:
        total, y, inverse = operators.rms_norm(x, branch, scale, eps)
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
        dx, dscale = operators.rms_norm_back(*ctx.saved_tensors, dy, dtotal)
        return dx, dx if ctx.needs_input_grad[1] else None, dscale.sum(0), None


# ---------------------------------------------------------------- convolution


def causal_conv(x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, inside: Tensor) -> Tensor:
    t = x.shape[1]
    if t == 1:
        return NotImplemented  # the plain formula takes fewer steps
    if operators.available(x):
        return CausalConvFunction.apply(x, taps, weight, bias, inside)
    # tap by tap: a fifth of the plain formula's time, which holds all windows at once (measured)
    extended = torch.cat([taps, x], dim=1)
    y = torch.addcmul(bias, extended[:, -t:], weight[-1])
    for i in range(len(weight) - 1):
        y = torch.addcmul(y, extended[:, i : i + t] * inside[..., i : i + 1], weight[i])
    return y


class CausalConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps, weight, inside)
        return operators.conv(x, taps, weight, bias, inside)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        dx, dtaps, dweight, dbias = operators.conv_back(*ctx.saved_tensors, dy)
        return dx, dtaps, dweight.sum(0), dbias.sum(0), None


# ---------------------------------------------------------------- RG-LRU


def rg_lru(
    x: Tensor, weight: Tensor, bias: Tensor, log_radius: Tensor, reset: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor]:
    if operators.available(x):
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
        gates = torch.bmm(x.reshape(-1, h, w).transpose(0, 1), weight)  # (h bt 2w), logits so far
        states = operators.gated_scan(x, gates, bias, log_radius, reset, h0)
        ctx.save_for_backward(x, weight, log_radius, reset, h0, gates, states)
        return states, states[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dstates: Tensor, dlast: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None, Tensor]:
        x, weight, log_radius, reset, h0, gates, states = ctx.saved_tensors
        h, w, _ = weight.shape
        dx, dgates, dbias, dlog_radius, dh0 = operators.gated_scan_back(
            x, gates, log_radius, reset, h0, states, dstates, dlast, 0.5 / MAX_SQRT_GRADIENT
        )
        dweight = torch.bmm(x.reshape(-1, h, w).permute(1, 2, 0), dgates)
        dx.view(-1, h, w).add_(torch.bmm(dgates, weight.mT).transpose(0, 1))
        return dx, dweight, dbias.sum(0).view(2, h, w), dlog_radius.sum(0), None, dh0


# ---------------------------------------------------------------- gate of the MLP


def gelu_gate(gate: Tensor, x: Tensor) -> Tensor:
    if gate.dtype == x.dtype and operators.available(x):
        return _GeluGateFunction.apply(gate, x)
    return NotImplemented


class _GeluGateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        return operators.gelu_gate(gate, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return operators.gelu_gate_back(*ctx.saved_tensors, dy)


# ---------------------------------------------------------------- rows by index


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    return _TakeRowsFunction.apply(x, index) if operators.available(x) else NotImplemented


class _TakeRowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n = x.shape[1]
        return operators.take_rows(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return operators.add_rows(dy, *ctx.saved_tensors, ctx.n), None


def add_rows(y: Tensor, index: Tensor, n: int) -> Tensor:
    return _AddRowsFunction.apply(y, index, n) if operators.available(y) else NotImplemented


class _AddRowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, index: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(index)
        return operators.add_rows(y, index, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return operators.take_rows(dx, *ctx.saved_tensors), None, None


def placed_gelu(x: Tensor, index: Tensor, table: Tensor, place: Tensor) -> Tensor:
    if x.dtype == table.dtype and operators.available(x):
        return _PlacedGeluFunction.apply(x, index, table, place)
    return NotImplemented


class _PlacedGeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, table: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(x, index, table, place)
        return operators.placed_gelu(x, index, table, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, None]:
        dx, dtable = operators.placed_gelu_back(*ctx.saved_tensors, dy)
        return dx, None, dtable.sum(0), None


def softmax_nats(logits: Tensor, target: Tensor) -> Tensor:
    return _SoftmaxNatsFunction.apply(logits, target) if operators.available(logits) else NotImplemented


class _SoftmaxNatsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        nats, log_sum = operators.softmax_nats(logits, target)
        ctx.save_for_backward(logits, target, log_sum)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnats: Tensor) -> tuple[Tensor, None]:
        return operators.softmax_nats_back(*ctx.saved_tensors, dnats), None
