"""Faster forms of `hldm.model.ops`: autograd functions with their derivatives written out.

Left to autograd these elementwise chains cost a CPU nearly as much as the matrix products; so, 0.6 of that
(measured, width 128). All but the convolution decline where `hldm.kernels.operators` has no kernels: written out in
torch, norm and gates save 2 % of a training step. tests/kernels/test_forms.py holds them to the plain formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hldm.kernels import operators
from hldm.model import ops


def _form(
    plain: Callable[..., Any],
    operator: Callable[..., Any],
    *,
    keep: Callable[..., Sequence[Tensor]],
    derivative: Callable[..., Any],
) -> Callable[..., Any]:
    """The form of a plain function that is one operator each way; it declines what the operator cannot take.

    keep: what the backward pass needs, of the inputs and what the operator returns besides the output
    derivative: the gradients of all inputs, of a context with what was kept and the first input's shape, and of that
    of the output
    """

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        found = operator(*inputs)
        y, *more = found if isinstance(found, tuple) else (found,)
        ctx.save_for_backward(*keep(*inputs, *more))
        ctx.shape = inputs[0].shape
        return y

    methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(derivative))}
    name = "".join(part.capitalize() for part in plain.__name__.split("_")) + "Function"
    function: Any = type(name, (torch.autograd.Function,), methods)

    @wraps(plain)
    def form(*inputs: Any) -> Any:
        dtypes = {x.dtype for x in inputs if isinstance(x, Tensor)} - {torch.int64}
        return (
            function.apply(*inputs) if len(dtypes) == 1 and operators.available(inputs[0]) else NotImplemented
        )

    return form


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
        return _fused_conv(x, taps, weight, bias, inside)
    # tap by tap: a fifth of the plain formula's time, which holds all windows at once (measured)
    extended = torch.cat([taps, x], dim=1)
    y = torch.addcmul(bias, extended[:, -t:], weight[-1])
    for i in range(len(weight) - 1):
        y = torch.addcmul(y, extended[:, i : i + t] * inside[..., i : i + 1], weight[i])
    return y


def _conv_back(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    dx, dtaps, dweight, dbias = operators.conv_back(*ctx.saved_tensors, dy)
    return dx, dtaps, dweight.sum(0), dbias.sum(0), None


_fused_conv = _form(
    ops.causal_conv,
    operators.conv,
    keep=lambda x, taps, weight, bias, inside: (x, taps, weight, inside),
    derivative=_conv_back,
)


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
            x, gates, log_radius, reset, h0, states, dstates, dlast, 0.5 / ops.MAX_SQRT_GRADIENT
        )
        dweight = torch.bmm(x.reshape(-1, h, w).permute(1, 2, 0), dgates)
        dx.view(-1, h, w).add_(torch.bmm(dgates, weight.mT).transpose(0, 1))
        return dx, dweight, dbias.sum(0).view(2, h, w), dlog_radius.sum(0), None, dh0


# ---------------------------------------------------------------- one operator each way

gelu_gate = _form(
    ops.gelu_gate,
    operators.gelu_gate,
    keep=lambda gate, x: (gate, x),
    derivative=lambda ctx, dy: operators.gelu_gate_back(*ctx.saved_tensors, dy),
)
take_rows = _form(
    ops.take_rows,
    operators.take_rows,
    keep=lambda x, index: (index,),
    derivative=lambda ctx, dy: (operators.add_rows(dy, *ctx.saved_tensors, ctx.shape[1]), None),
)
add_rows = _form(
    ops.add_rows,
    operators.add_rows,
    keep=lambda y, index, n: (index,),
    derivative=lambda ctx, dx: (operators.take_rows(dx, *ctx.saved_tensors), None, None),
)
softmax_nats = _form(
    ops.softmax_nats,
    operators.softmax_nats,
    keep=lambda logits, target, log_sum: (logits, target, log_sum),
    derivative=lambda ctx, dnats: (operators.softmax_nats_back(*ctx.saved_tensors, dnats), None),
)


def _placed_gelu_back(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, None]:
    dx, dtable = operators.placed_gelu_back(*ctx.saved_tensors, dy)
    return dx, None, dtable.sum(0), None


placed_gelu = _form(
    ops.placed_gelu,
    operators.placed_gelu,
    keep=lambda x, index, table, place: (x, index, table, place),
    derivative=_placed_gelu_back,
)
