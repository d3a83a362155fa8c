"""Faster forms of the linear recurrence h_t = a_t h_{t-1} + b_t, and nothing about what a and b mean.

A chunked form in torch that runs anywhere and, on a GPU, one pass of Triton where that can be compiled. Neither divides
by a product of decays nor takes its logarithm, as the closed forms do: a decay of exactly 0 starts a document, and both
would turn it into NaN. On a CPU the RG-LRU has a kernel of its own.
"""

from __future__ import annotations

import inspect
import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hldm.model import ops

# Measured on one CPU core: a call on few numbers costs about as much as one on 30 thousand; more leave the cache.
NUMBERS_PER_CALL = 32_768

logger = logging.getLogger(__name__)


def scan(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest that can be had here; `hldm.model.ops.scan` says what of."""
    if a.shape[1] == 1:
        return NotImplemented  # one step of the plain loop
    if runs_in_triton(b):
        return _in_triton(a, b, h0)
    # torch.compile sees the plain loop: it cannot see through tensors that are written into
    return NotImplemented if torch.compiler.is_compiling() else ChunkedScan.apply(a, b, h0)


def runs_in_triton(x: Tensor) -> bool:
    """Whether one pass of Triton takes x, in float32 or float64: on a GPU, or slowly in its interpreter, for tests."""
    return (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _trust_triton(x.device, x.dtype)


def _in_triton(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    from hldm.kernels.triton_scan import OnePassScan

    return OnePassScan.apply(a, b, h0)


@torch.compiler.assume_constant_result
def _trust_triton(device: torch.device, dtype: torch.dtype) -> bool:
    return _triton_agrees(device, dtype)


@cache
def _triton_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether triton is there, compiles the kernels for the device, and says there what the loop says."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            numbers = torch.linspace(-1, 1, 3 * 5 * 34, dtype=dtype, device=device)
            a, b = (x.view(3, 5, 34).requires_grad_() for x in (numbers, numbers.flip(0)))
            found, expected = (
                torch.autograd.grad(scan(a, b, a[:, 1])[0].square().sum(), [a, b])
                for scan in (_in_triton, inspect.unwrap(ops.scan))
            )
        torch.testing.assert_close(found, expected)
    except Exception as error:  # whatever a compiler, a driver or a version of triton may raise
        logger.debug("no scan in Triton on %s: %s", device, error)
        return False
    return True


class ChunkedScan(torch.autograd.Function):
    """The recurrence over many chunks of time at once, joined by a scan over the chunks.

    Backward is the same recurrence in reverse: db_t = dh_t + a_{t+1} db_{t+1}, da_t = db_t h_{t-1}.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.empty_like(b)
        h_last = _scan_into(h, a, b, h0).clone()
        ctx.save_for_backward(a, h0, h)
        return h, h_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dh_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h0, h = ctx.saved_tensors
        db = torch.empty_like(h)
        torch.add(dh[:, -1], dh_last, out=db[:, -1])
        if a.shape[1] > 1:
            _scan_into(db[:, :-1], a[:, 1:], dh[:, :-1], db[:, -1], reverse=True)
        da = torch.empty_like(a)
        torch.mul(db[:, 0], h0, out=da[:, 0])
        torch.mul(db[:, 1:], h[:, :-1], out=da[:, 1:])
        return da, db, a[:, 0] * db[:, 0]


def _scan_into(h: Tensor, a: Tensor, b: Tensor, h0: Tensor, reverse: bool = False) -> Tensor:
    """Write h_t = a_t h_{t-1} + b_t into h, from h0 on; backwards in time when reverse. Returns the last state.

    Time is cut into n chunks of c steps. First every chunk runs from zero, all at once, for what it does to a state:
    multiply it by the product of its decays and add its own last state. These pairs form a recurrence over n chunks,
    solved by this same function. Then every chunk runs again, now from the state that truly enters it.
    """
    t = h.shape[1]
    c = _chunk_steps(h)
    n = t // c
    if n < 2:
        steps = list(zip(h.unbind(1), a.unbind(1), b.unbind(1), strict=True))
        for h_t, a_t, b_t in reversed(steps) if reverse else steps:
            h0 = torch.addcmul(b_t, a_t, h0, out=h_t)
        return h0

    # Whole chunks first, the remainder after them, in the order of the recurrence.
    whole, rest = slice(0, n * c), slice(n * c, t)
    all_but_last, all_but_first = slice(0, n - 1), slice(1, n)
    if reverse:
        whole, rest = slice(t - n * c, t), slice(0, t - n * c)
        all_but_last, all_but_first = all_but_first, all_but_last
    steps = [
        (h_c, a_c, b_c)  # (b n d): one step of every chunk
        for h_c, a_c, b_c in zip(
            *(x[:, whole].unflatten(1, (n, c)).unbind(2) for x in (h, a, b)), strict=True
        )
    ]
    if reverse:
        steps.reverse()

    # What each chunk but the last does to a state.
    product = steps[0][1][:, all_but_last].clone(memory_format=torch.contiguous_format)
    ending = steps[0][2][:, all_but_last].clone(memory_format=torch.contiguous_format)
    for _, a_c, b_c in steps[1:]:
        a_c = a_c[:, all_but_last]
        product.mul_(a_c)
        torch.addcmul(b_c[:, all_but_last], a_c, ending, out=ending)

    # The state that enters each chunk.
    entering = h.new_empty(h.shape[0], n, h.shape[2])
    entering[:, -1 if reverse else 0] = h0
    _scan_into(entering[:, all_but_first], product, ending, h0, reverse)

    for h_c, a_c, b_c in steps:
        entering = torch.addcmul(b_c, a_c, entering, out=h_c)
    h0 = entering[:, 0 if reverse else -1]
    return _scan_into(h[:, rest], a[:, rest], b[:, rest], h0, reverse) if n * c < t else h0


def _chunk_steps(h: Tensor) -> int:
    """How many steps a chunk takes: as few calls as possible, each on numbers enough to be worth the call."""
    batch, t, d = h.shape
    if h.device.type != "cpu":
        return 8  # launches dominate: 3 c log_c(t) of them
    if batch * d >= NUMBERS_PER_CALL // 8:
        return t  # one step is work enough, and the loop reads a and b once instead of twice
    return min(max(t * batch * d // NUMBERS_PER_CALL, 8), 64)
