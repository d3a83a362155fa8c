"""Rows of a tensor by their number, and what is done to them at once: autograd functions for both models' ends.

Gathering and summing rows, a readout that knows its place, and the price of a symbol. Where `hldm.kernels.operators` has
kernels each is one pass forward and one back; torch's own operators do the same elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hldm.kernels import operators


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (b n d) at index (b t), which is 0 to n - 1. (b t d)."""
    if operators.available(x):
        return _TakeRowsFunction.apply(x, index)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def add_rows(y: Tensor, index: Tensor, n: int) -> Tensor:
    """Sums of the y (b t d) that share an index (b t) below n; -1: of none. (b n d)."""
    if operators.available(y):
        return _AddRowsFunction.apply(y, index, n)
    b, _, d = y.shape
    # one row of sums for all, with a spare one at the end of each document for what has no index
    spare = index.masked_fill(index < 0, n) + (n + 1) * torch.arange(b, device=y.device)[:, None]
    total = y.new_zeros(b * (n + 1), d).index_add(0, spare.flatten(), y.flatten(0, 1))
    return total.view(b, n + 1, d)[:, :n]


def placed_gelu(x: Tensor, index: Tensor, table: Tensor, place: Tensor) -> Tensor:
    """gelu(x_index + table_place), gelu in its exact form.

    x (b n d), index (b t) of 0 to n - 1, table (k d), place (b t) of 0 to k - 1. Returns (b t d).
    """
    if x.dtype == table.dtype and operators.available(x):
        return _PlacedGeluFunction.apply(x, index, table, place)
    return F.gelu(take_rows(x, index) + F.embedding(place, table))


def softmax_nats(logits: Tensor, target: Tensor) -> Tensor:
    """-log softmax(logits)_target. (n v), (n) -> (n)."""
    if operators.available(logits):
        return _SoftmaxNatsFunction.apply(logits, target)
    return F.cross_entropy(logits, target, reduction="none")


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


class _AddRowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, index: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(index)
        return operators.add_rows(y, index, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return operators.take_rows(dx, *ctx.saved_tensors), None, None


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
