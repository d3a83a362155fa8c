"""The linear recurrence h_t = a_t h_{t-1} + b_t on a GPU, in Triton: one pass over memory each way.

Compiled for CUDA devices and run in Triton's interpreter by the tests, which need triton; NOT YET RUN ON A GPU, so
`hldm.kernels.scan` compares a few numbers with torch before it uses this, and does without where they differ, triton is
missing or a kernel does not compile. Import this module only where triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# One warp: its 32 floats are a line of the cache. Small batches need many programs more than large ones.
LANES = tl.constexpr(32)
# Steps on their way from memory while one is computed: copies in the background, as each step waits for the one before.
AHEAD = tl.constexpr(8)

# Fused a h + b, as `torch.addcmul` does.
OPTIONS = {"num_warps": LANES.value // 32, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["lanes", "t", "d"])  # one compilation for texts of every length
def forward_kernel(a, b, h0, h, lanes, t, d):
    """Each program walks time with the states of some of the lanes, which are the b d channels of all rows."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = lane < lanes
    state = tl.load(h0 + lane, mask=inside)
    at = lane // d * t * d + lane % d
    for _ in tl.range(0, t, num_stages=AHEAD):
        state = tl.load(a + at, mask=inside) * state + tl.load(b + at, mask=inside)
        tl.store(h + at, state, mask=inside)
        at += d


@triton.jit(do_not_specialize=["lanes", "t", "d"])
def backward_kernel(a, h0, h, dh, dh_last, da, db, dh0, lanes, t, d):
    """The same in reverse: db_t = dh_t + a_{t+1} db_{t+1}, da_t = db_t h_{t-1}."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = lane < lanes
    carried = tl.load(dh_last + lane, mask=inside)
    at = lane // d * t * d + lane % d + (t - 1).to(tl.int64) * d
    for _ in tl.range(1, t, num_stages=AHEAD):
        dstate = tl.load(dh + at, mask=inside) + carried
        tl.store(db + at, dstate, mask=inside)
        tl.store(da + at, dstate * tl.load(h + at - d, mask=inside), mask=inside)
        carried = tl.load(a + at, mask=inside) * dstate
        at -= d
    # The first step: h0 came before it.
    dstate = tl.load(dh + at, mask=inside) + carried
    tl.store(db + at, dstate, mask=inside)
    tl.store(da + at, dstate * tl.load(h0 + lane, mask=inside), mask=inside)
    tl.store(dh0 + lane, tl.load(a + at, mask=inside) * dstate, mask=inside)


def _launch(kernel: triton.runtime.KernelInterface, shape: torch.Size, *tensors: Tensor) -> None:
    """The kernel on contiguous tensors of one dtype and device, for h of shape (b t d)."""
    assert all(x.dtype == tensors[0].dtype and x.is_contiguous() for x in tensors)
    b, t, d = shape
    if b * d:
        with torch.cuda.device_of(tensors[0]):
            kernel[(triton.cdiv(b * d, LANES.value),)](*tensors, b * d, t, d, **OPTIONS)


@torch.library.custom_op("hldm::triton_scan", mutates_args=())
def scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """All states (b t d) of the recurrence; a, b (b t d), h0 (b d)."""
    h = b.new_empty(b.shape)
    _launch(forward_kernel, b.shape, a.contiguous(), b.contiguous(), h0.contiguous(), h)
    return h


@scan.register_fake
def _(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    return b.new_empty(b.shape)


@torch.library.custom_op("hldm::triton_scan_back", mutates_args=())
def scan_back(a: Tensor, h0: Tensor, h: Tensor, dh: Tensor, dh_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and h0, from those of all states and of the last one."""
    da, db, dh0 = written = _empty_gradients(a, h0, h, dh, dh_last)
    read = (x.contiguous() for x in (a, h0, h, dh, dh_last))
    _launch(backward_kernel, h.shape, *read, da, db, dh0)
    return written


@scan_back.register_fake
def _empty_gradients(
    a: Tensor, h0: Tensor, h: Tensor, dh: Tensor, dh_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape), h0.new_empty(h0.shape)


class OnePassScan(torch.autograd.Function):
    """As the chunked scan of `hldm.kernels.scan`, each direction one pass of a kernel."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        h = scan(a, b, h0)
        ctx.save_for_backward(a, h0, h)
        return h, h[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dh_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return scan_back(*ctx.saved_tensors, dh, dh_last)
