from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from hldm.kernels import scan
from hldm.model import ops
from hldm.model.ops import linear_scan

BACKENDS = {"loop": inspect.unwrap(ops.scan), "chunked": scan.ChunkedScan.apply}
if scan.runs_in_triton(torch.ones(1)):
    BACKENDS["triton"] = scan._in_triton
HERE = sorted(BACKENDS)
FAST = [name for name in HERE if name != "loop"]


def linear_scan_by(backend: str, a: Tensor, x: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`linear_scan` by one of the forms."""
    h, h_last = BACKENDS[backend](*ops.scan_inputs(a, x, h0))
    return h.to(x.dtype), h_last


def random_inputs(
    b: int, t: int, d: int, *, decay: str = "any", dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(b * 1000 + t * 10 + d)
    a = torch.rand(b, t, d, generator=generator, dtype=torch.float64)
    if decay == "zeros":
        a = torch.where(a < 0.3, 0.0, a)
    elif decay == "near one":
        a = 1 - 1e-6 * a
    elif decay == "one":
        a = torch.ones_like(a)
    x = torch.randn(b, t, d, generator=generator, dtype=torch.float64)
    h0 = torch.randn(b, d, generator=generator, dtype=torch.float64)
    return [y.to(dtype).requires_grad_() for y in (a, x, h0)]


def gradients(inputs: list[Tensor], backend: str) -> list[Tensor]:
    """Outputs and input gradients of a loss that depends on every state and on the last one once more."""
    h, h_last = linear_scan_by(backend, *inputs)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(h.shape, generator=generator, dtype=h.dtype)
    loss = (h * weight).sum() + (h_last.sin() * 3).sum()
    return [h, h_last, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", ["any", "zeros", "near one", "one"])
@pytest.mark.parametrize("t", [1, 2, 15, 16, 17, 61, 128, 523])
def test_every_backend_agrees_with_the_loop(backend: str, decay: str, t: int) -> None:
    inputs = random_inputs(2, t, 3, decay=decay)
    for ours, loop in zip(gradients(inputs, backend), gradients(inputs, "loop"), strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("decay", ["any", "zeros", "near one", "one"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_rounding_is_all_that_is_lost(backend: str, decay: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = random_inputs(2, 61, 3, decay=decay, dtype=dtype)
    _, dh, dh_last = (x.detach() for x in random_inputs(2, 61, 3, dtype=dtype))

    def both_ways(x: list[Tensor], backend: str) -> list[Tensor]:
        states = linear_scan_by(backend, *x)
        gradient = [dh.to(states[0].dtype), dh_last.to(states[0].dtype)]
        return [*states, *torch.autograd.grad(states, x, gradient)]

    exact = both_ways([x.detach().double().requires_grad_() for x in inputs], "loop")
    for ours, truth in zip(both_ways(inputs, backend), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("shape", [(16, 65, 160), (9, 37, 512), (1, 300, 257)])
def test_the_size_of_the_problem_changes_the_schedule_not_the_result(shape: tuple[int, int, int]) -> None:
    inputs = random_inputs(*shape)
    for ours, loop in zip(gradients(inputs, "chunked"), gradients(inputs, "loop"), strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("t", [1, 5, 37])
def test_gradients_are_those_of_finite_differences(backend: str, t: int) -> None:
    inputs = random_inputs(2, t, 2)
    assert torch.autograd.gradcheck(lambda *x: linear_scan_by(backend, *x), inputs)


@pytest.mark.parametrize("backend", HERE)
def test_scan_in_two_pieces_equals_one_gradients_included(backend: str) -> None:
    a, x, h0 = inputs = random_inputs(2, 21, 3)
    whole, last = linear_scan_by(backend, a, x, h0)
    expected = torch.autograd.grad((whole.cos() * whole).sum() + last.sum(), inputs)
    for cut in range(1, 21):
        first, carry = linear_scan_by(backend, a[:, :cut], x[:, :cut], h0)
        second, end = linear_scan_by(backend, a[:, cut:], x[:, cut:], carry)
        h = torch.cat([first, second], dim=1)
        torch.testing.assert_close(h, whole)
        torch.testing.assert_close(end, last)
        found = torch.autograd.grad((h.cos() * h).sum() + end.sum(), inputs)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", FAST)
def test_a_decay_of_zero_forgets_everything_before_it(backend: str) -> None:
    a, x, h0 = (y.detach() for y in random_inputs(1, 40, 4))
    a[:, 23] = 0
    x[:, 7] = 1e300  # a product or logarithm of decays would let this through as inf or NaN
    h, _ = linear_scan_by(backend, a, x, h0)
    alone, _ = linear_scan_by(backend, a[:, 23:], x[:, 23:])
    torch.testing.assert_close(h[:, 23:], alone, rtol=0, atol=0)


@pytest.mark.parametrize("backend", FAST)
def test_strides_do_not_matter(backend: str) -> None:
    a, x, h0 = (y.detach() for y in random_inputs(3, 50, 6))
    expected = linear_scan_by(backend, a, x, h0)
    wide = torch.zeros(50, 3, 14, dtype=torch.float64)
    wide[..., 1:13:2] = a.transpose(0, 1)
    strided = wide[..., 1:13:2].transpose(0, 1).requires_grad_()
    x_back = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    found = linear_scan_by(backend, strided, x_back, h0)
    torch.testing.assert_close(found, expected)
    found[0].sum().backward()  # an expanded gradient: stride 0
    for ours, theirs in ((strided.grad, a), (x_back.grad, x)):
        leaf = [y.clone().requires_grad_() for y in (a, x, h0)]
        linear_scan_by("loop", *leaf)[0].sum().backward()
        torch.testing.assert_close(ours, leaf[0].grad if theirs is a else leaf[1].grad)


@pytest.mark.parametrize("backend", HERE)
def test_an_empty_batch_passes_through(backend: str) -> None:
    inputs = random_inputs(0, 40, 3)
    h, h_last = linear_scan_by(backend, *inputs)
    assert h.shape == (0, 40, 3) and h_last.shape == (0, 3)
    (h.sum() + h_last.sum()).backward()
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_accumulate_in_float32(backend: str, autocast: bool) -> None:
    a, x, h0 = random_inputs(2, 2048, 4, decay="near one", dtype=torch.bfloat16)
    exact, exact_last = linear_scan_by("loop", a.double(), x.double(), h0.double())
    with torch.autocast("cpu", enabled=autocast):
        h, h_last = linear_scan_by(backend, a, x, h0)
    assert h.dtype == torch.bfloat16 and h_last.dtype == torch.float32
    torch.testing.assert_close(h_last.double(), exact_last, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(h, exact.to(torch.bfloat16), rtol=1e-2, atol=1e-3)


def test_without_a_carried_state_it_starts_from_zero() -> None:
    a, x, h0 = random_inputs(2, 20, 3)
    for ours, theirs in zip(linear_scan(a, x), linear_scan(a, x, torch.zeros_like(h0)), strict=True):
        torch.testing.assert_close(ours, theirs)
