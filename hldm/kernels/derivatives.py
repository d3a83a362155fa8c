"""Faster forms of `hldm.model.ops`: autograd functions with their derivatives written out.

Left to autograd these elementwise chains cost a CPU nearly as much as the matrix products; so, 0.6 of that
(measured, width 128). Norm, convolution and gates have a form in torch, too, for where `hldm.kernels.operators` has no
kernels; the others decline there. tests/kernels/test_forms.py holds them to the plain formulas.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hldm.kernels import operators
from hldm.model.ops import MAX_SQRT_GRADIENT, at_least_float32, linear_scan

CACHED_NUMBERS = 65_536  # of a tensor at a time, to stay in a core's cache: 4 % of a training step (measured)


def _row_blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors that share their first axis, in blocks of it that stay in a CPU's cache; elsewhere all at once."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= CACHED_NUMBERS:
        return [tensors]
    rows = max(CACHED_NUMBERS * first.shape[0] // first.numel(), 1)
    return zip(*(x.split(rows) for x in tensors), strict=True)


# ---------------------------------------------------------------- norm


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    if x.dtype == scale.dtype and operators.available(x):
        return _KernelRMSNormFunction.apply(x, scale, eps)
    if not torch.is_grad_enabled():  # torch's own is as good
        return F.rms_norm(x, scale.shape, 1 + scale, eps)
    return RMSNormFunction.apply(x.flatten(0, -2), scale, eps).view(x.shape)


def add_rms_norm(x: Tensor, branch: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype == branch.dtype == scale.dtype and operators.available(x):
        return _AddRMSNormFunction.apply(x, branch, scale, eps)
    return NotImplemented


class _KernelRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        y, inverse = operators.rms_norm(x, scale, eps)
        ctx.save_for_backward(x, inverse, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dscale = operators.rms_norm_back(*ctx.saved_tensors, dy, None)
        return dx, dscale.sum(0), None


class _AddRMSNormFunction(torch.autograd.Function):
    """The sum goes on, too: what reaches it in the backward pass is added in the same pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, y, inverse = operators.add_rms_norm(x, branch, scale, eps)
        ctx.save_for_backward(total, inverse, scale)
        ctx.set_materialize_grads(False)  # None where nobody reads the sum, or the norm
        return total, y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dtotal: Tensor | None, dy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if dy is None:
            return dtotal, dtotal, None, None
        dx, dscale = operators.rms_norm_back(*ctx.saved_tensors, dy, dtotal)
        return dx, dx, dscale.sum(0), None


class RMSNormFunction(torch.autograd.Function):
    """y = x / sqrt(mean x^2 + eps) (1 + scale); x (n d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[0], 1, dtype=at_least_float32(x[:0]).dtype)
        gain = 1 + scale
        for x_n, y_n, inverse_n in _row_blocks(x, y, inverse):
            x_n = at_least_float32(x_n)
            torch.linalg.vector_norm(x_n, dim=1, keepdim=True, out=inverse_n)
            inverse_n.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            torch.mul(x_n * inverse_n, gain, out=y_n)
        ctx.save_for_backward(x, inverse, gain)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse, gain = ctx.saved_tensors
        dx, dscale = torch.empty_like(x), torch.zeros_like(gain, dtype=inverse.dtype)
        for x_n, inverse_n, dy_n, dx_n in _row_blocks(x, inverse, dy, dx):
            unit = at_least_float32(x_n) * inverse_n
            product = dy_n * unit
            dscale += product.sum(0)
            along = (product @ gain.to(product.dtype)).div_(x.shape[1])
            torch.mul(dy_n, gain, out=product).addcmul_(unit, along[:, None], value=-1)
            torch.mul(product, inverse_n, out=dx_n)
        return dx, dscale, None


# ---------------------------------------------------------------- convolution


def causal_conv(x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, inside: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return NotImplemented  # the plain formula takes fewer steps
    return CausalConvFunction.apply(x, taps, weight, bias, inside)


class CausalConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps, weight, inside)
        if operators.available(x):
            return operators.conv(x, taps, weight, bias, inside)
        k, t = weight.shape[0], x.shape[1]
        y = torch.empty_like(x)
        for x_n, taps_n, inside_n, y_n in _row_blocks(x, taps, inside, y):
            extended = torch.cat([taps_n, x_n], dim=1)
            torch.addcmul(bias, x_n, weight[-1], out=y_n)
            for i in range(k - 1):
                y_n.addcmul_(extended[:, i : i + t] * inside_n[..., i : i + 1], weight[i])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, taps, weight, inside = ctx.saved_tensors
        if operators.available(x):
            dx, dtaps, dweight, dbias = operators.conv_back(x, taps, weight, inside, dy)
            return dx, dtaps, dweight.sum(0), dbias.sum(0), None
        k, t = weight.shape[0], x.shape[1]
        dx, dtaps = torch.empty_like(x), torch.empty_like(taps)
        dweight, dbias = torch.zeros_like(weight), torch.zeros_like(weight[0])
        for x_n, taps_n, inside_n, dy_n, dx_n, dtaps_n in _row_blocks(x, taps, inside, dy, dx, dtaps):
            extended = torch.cat([taps_n, x_n], dim=1)
            dextended = torch.zeros_like(extended)
            for i in range(k):
                dy_i = dy_n * inside_n[..., i : i + 1]
                dextended[:, i : i + t].addcmul_(dy_i, weight[i])
                dweight[i] += dy_i.mul_(extended[:, i : i + t]).sum((0, 1))
            dbias += dy_n.sum((0, 1))
            dtaps_n.copy_(dextended[:, : k - 1])
            dx_n.copy_(dextended[:, k - 1 :])
        return dx, dtaps, dweight, dbias, None


# ---------------------------------------------------------------- RG-LRU


def rg_lru(
    x: Tensor, weight: Tensor, bias: Tensor, log_radius: Tensor, reset: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor]:
    if operators.available(x):
        return GatedScanFunction.apply(x, weight, bias, log_radius, reset, h0)
    a, b = GatedDecayFunction.apply(x.flatten(0, 1), weight, bias, log_radius, reset.reshape(-1, 1))
    return linear_scan(a.view(x.shape), b.view(x.shape), h0)


class GatedDecayFunction(torch.autograd.Function):
    """The gates of the RG-LRU: from its input to the coefficients a and b of h_t = a_t h_{t-1} + b_t.

    x (n d), weight (h w 2w), bias (2 h w), log_radius (d), reset (n 1) 0 or minus infinity -> a, b (n d)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, log_radius: Tensor, reset: Tensor
    ) -> tuple[Tensor, Tensor]:
        h, w, _ = weight.shape
        gates = x.new_empty(x.shape[0], 2, h * w)
        a, b, multiplier = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        for x_n, reset_n, gates_n, a_n, b_n, multiplier_n in _row_blocks(x, reset, gates, a, b, multiplier):
            logits = torch.bmm(x_n.unflatten(1, (h, w)).transpose(0, 1), weight)  # (h n 2w)
            logits = logits.unflatten(2, (2, w)).permute(1, 2, 0, 3)  # (n 2 h w)
            i_n, r_n = (
                torch.add(logits, bias, out=gates_n.unflatten(2, (h, w))).flatten(2).sigmoid_().unbind(1)
            )
            log_a = torch.mul(r_n, log_radius, out=multiplier_n).add_(reset_n)
            torch.exp(log_a, out=a_n)
            log_a.mul_(2).expm1_().neg_().sqrt_()  # expm1: 1 - exp(2 log a) loses all digits as a nears 1
            torch.mul(x_n, i_n, out=b_n).mul_(multiplier_n)
        ctx.save_for_backward(x, weight, log_radius, gates, a, multiplier)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor, db: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, weight, log_radius, gates, a, multiplier = ctx.saved_tensors
        h, w, _ = weight.shape
        dx, dweight, dbias = torch.empty_like(x), torch.zeros_like(weight), x.new_zeros(2, h, w)
        dlog_radius = torch.zeros_like(log_radius)
        blocks = _row_blocks(x, gates, a, multiplier, da, db, dx)
        for x_n, gates_n, a_n, multiplier_n, da_n, db_n, dx_n in blocks:
            i_n, r_n = gates_n.unbind(1)
            dgates = torch.empty_like(gates_n)
            di, dr = dgates.unbind(1)
            torch.mul(db_n, i_n, out=dx_n).mul_(multiplier_n)
            torch.mul(db_n, x_n, out=di)
            # d multiplier / d log a = -a^2 / multiplier, bounded as the square root's derivative is
            dlog_a = (di * i_n).mul_(a_n).div_(multiplier_n.clamp(min=0.5 / MAX_SQRT_GRADIENT))
            torch.sub(da_n, dlog_a, out=dlog_a).mul_(a_n)
            di.mul_(multiplier_n)
            torch.mul(dlog_a, log_radius, out=dr)
            dlog_radius += dlog_a.mul_(r_n).sum(0)
            dlogits = torch.ops.aten.sigmoid_backward(dgates, gates_n).unflatten(2, (h, w))  # (n 2 h w)
            dbias += dlogits.sum(0)
            dlogits = dlogits.permute(2, 0, 1, 3).flatten(2)  # (h n 2w)
            dweight.baddbmm_(x_n.unflatten(1, (h, w)).permute(1, 2, 0), dlogits)
            dx_n.unflatten(1, (h, w)).add_(torch.bmm(dlogits, weight.mT).transpose(0, 1))
        return dx, dweight, dbias, dlog_radius, None


class GatedScanFunction(torch.autograd.Function):
    """The RG-LRU whole, where kernels are available.

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
