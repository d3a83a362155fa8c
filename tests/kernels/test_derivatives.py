"""Layers with C++ kernels are the same as without: values, gradients, threads, bad numbers, torch.compile."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from hldm.config import GriffinConfig
from hldm.model.griffin import RGLRU, Layout, RecurrentBlock
from hldm.model.ops import gelu_gate, linear_scan


@pytest.fixture(autouse=True)
def with_kernels(plain_torch):
    """Only where there are kernels."""


def measure(block: RecurrentBlock, x: Tensor, doc_start: Tensor) -> list[Tensor]:
    """Outputs and state of a block after a stretch of text, and all gradients of a loss on them."""
    state = block.initial_state(len(x), x.device, x.dtype)
    state = type(state)(*(torch.full_like(part, 0.3).requires_grad_() for part in state))
    x = x.clone().requires_grad_()
    y, after = block(x, state, Layout.of(doc_start, doc_start, None))
    loss = (y * y.detach().cos()).sum() + after.hidden.square().sum() + after.taps.sum()
    return [y, *after, *torch.autograd.grad(loss, [x, *state, *block.parameters()])]


@pytest.mark.parametrize(("width", "heads", "b", "t"), [(24, 3, 3, 37), (40, 1, 1, 600), (8, 2, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_recurrent_block_is_the_same_as_in_torch(plain_torch, width, heads, b, t, dtype):
    torch.manual_seed(0)
    block = RecurrentBlock(GriffinConfig(width=width, heads=heads), out_variance=1.0).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, doc_start = torch.randn(b, t, width, dtype=dtype), torch.rand(b, t) < 0.1
    ours = measure(block, x, doc_start)
    with plain_torch():
        plain = measure(block, x, doc_start)
        exact = measure(block.double(), x.double(), doc_start)
    for found, other, truth in zip(ours, plain, exact, strict=True):
        scale = truth.abs().max().item() + 1
        if dtype == torch.float64:
            torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12 * scale)
        # no further from the truth than torch is, give or take
        off, others = ((part.double() - truth).abs().max().item() for part in (found, other))
        assert off <= 3 * others + 1e-6 * scale


def test_threads_share_the_work_and_change_nothing():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    for shape in ((1, 3000, 48), (5, 700, 80)):
        block = RecurrentBlock(GriffinConfig(width=shape[2], heads=4), out_variance=1.0)
        x, doc_start = torch.randn(shape), torch.rand(shape[:2]) < 0.01
        a = torch.rand(shape)
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            layout = Layout.of(doc_start, doc_start, None)
            h, last = block.rg_lru(x, torch.ones(shape[0], shape[2]), layout.reset)
            found.append(
                [h, last, linear_scan(a, x)[0], *torch.autograd.grad(h.sum(), block.rg_lru.gate_weight)]
            )
        torch.set_num_threads(before)
        for one, three in zip(*found, strict=True):
            torch.testing.assert_close(one, three, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_gates_that_are_saturated_stay_finite(size):
    unit = RGLRU(16, 2)
    x = (size * torch.randn(2, 30, 16)).requires_grad_()
    h, _ = unit(x, torch.ones(2, 16), torch.zeros(2, 30))
    assert h.isfinite().all()
    (gradient,) = torch.autograd.grad((h / size).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_is_not_hidden(bad):
    unit, x = RGLRU(16, 2), torch.randn(1, 30, 16)
    x[0, 7, 3] = bad
    h, last = unit(x, torch.zeros(1, 16), torch.zeros(1, 30))
    assert not h[0, 7:, 3].isfinite().any() and not last[0, 3].isfinite()
    assert h[0, :7].isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch.compile's own doing
def test_torch_compile_sees_the_plain_formulas():
    torch.manual_seed(0)
    unit, reset = RGLRU(16, 2), torch.zeros(2, 30)

    def work(x: Tensor, h0: Tensor) -> Tensor:
        h, last = unit(2 * x, h0, reset)
        return linear_scan(h.sigmoid(), h)[0].sum() + last.sum()

    x, h0 = torch.randn(2, 30, 16, requires_grad=True), torch.randn(2, 16, requires_grad=True)
    compiled = torch.compile(work, backend="aot_eager", fullgraph=True)
    wanted = [x, h0, *unit.parameters()]
    found, expected = (torch.autograd.grad(f(x, h0), wanted) for f in (compiled, work))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gate_of_the_mlp_is_torchs_own(plain_torch, dtype):
    generator = torch.Generator().manual_seed(0)
    gate, x, weight = (5 * torch.randn(3, 30_001, generator=generator, dtype=dtype) for _ in range(3))
    found = []
    for plain in (False, True):
        # the truth in float64: torch's own float32 is 0 in the far tail, where this is not
        leaves = [(part.double() if plain else part).clone().requires_grad_() for part in (gate, x)]
        with plain_torch() if plain else nullcontext():
            y = gelu_gate(*leaves)
        gradients = torch.autograd.grad(y, leaves, weight.to(y.dtype))
        found.append([part.double() for part in (y, *gradients)])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=10 * tolerance)
