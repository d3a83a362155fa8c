"""Rows by their number, readout and price of a symbol are what torch makes of them, in values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hldm.kernels.derivatives import add_rms_norm, rms_norm
from hldm.model.ops import add_rows, placed_gelu, softmax_nats, take_rows

N, T, D, K = 5, 41, 24, 6
NAMES = ("take_rows", "add_rows", "placed_gelu", "softmax_nats", "rms_norm", "add_rms_norm", "the norm alone")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def numbered(*shape: int, below: int, least: int = 0) -> Tensor:
    return torch.randint(least, below, shape)


def case(name: str, b: int) -> tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]:
    """A function of tensors, and tensors to try it on."""
    torch.manual_seed(0)
    index, place, none_too = (
        numbered(b, T, below=N),
        numbered(b, T, below=K),
        numbered(b, T, below=N, least=-1),
    )
    target = numbered(b * T, below=258)
    cases: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]] = {
        "take_rows": (lambda x: take_rows(x, index), [drawn(b, N, D)]),
        "add_rows": (lambda y: add_rows(y, none_too, N), [drawn(b, T, D)]),
        "placed_gelu": (lambda x, p: placed_gelu(x, index, p, place), [3 * drawn(b, N, D), drawn(K, D)]),
        "softmax_nats": (lambda x: softmax_nats(x, target), [5 * drawn(b * T, 258)]),
        "rms_norm": (lambda x, scale: rms_norm(x, scale, 1e-6), [3 * drawn(b, T, D), drawn(D)]),
        "add_rms_norm": (
            lambda x, y, scale: add_rms_norm(x, y, scale, 1e-6),
            [drawn(b, T, D), drawn(b, T, D), drawn(D)],
        ),
        "the norm alone": (
            lambda x, y, scale: add_rms_norm(x, y, scale, 1e-6)[1],
            [drawn(b, T, D), drawn(b, T, D), drawn(D)],
        ),
    }
    return cases[name]


def measure(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    """Values, and gradients of a sum of them with weights of their own."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    values = [out] if isinstance(out, Tensor) else list(out)
    loss = sum(((y * y.detach().cos()).sum() for y in values), start=torch.zeros(()))
    return [*values, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kernel_is_what_torch_does(plain_torch, name, dtype):
    function, inputs = case(name, b=3)
    ours = measure(function, [x.to(dtype) for x in inputs])
    with plain_torch():
        exact = measure(function, [x.to(dtype).double() for x in inputs])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for found, truth in zip(ours, exact, strict=True):
        scale = truth.abs().max().item() + 1
        torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=10 * tolerance * scale)


@pytest.mark.parametrize("name", NAMES)
def test_threads_change_nothing(plain_torch, name):
    function, inputs = case(name, b=100)  # 3 threads' worth
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(measure(function, inputs))
    torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_is_not_hidden(plain_torch, bad):
    logits, x = torch.zeros(2, 258), torch.ones(2, 8)
    logits[0, 7] = x[0, 3] = bad
    nats = softmax_nats(logits, torch.tensor([3, 3]))
    assert not nats[0].isfinite() and nats[1].isfinite()
    y = rms_norm(x, torch.zeros(8), 1e-6)
    assert not y[0].isfinite().all() and y[1].isfinite().all()


def test_a_symbol_that_does_not_exist_has_no_price(plain_torch):
    assert softmax_nats(torch.zeros(2, 258), torch.tensor([258, -1])).isnan().all()


@pytest.mark.parametrize("index", [[0, N], [-2, 0]])
def test_an_index_outside_is_refused(plain_torch, index):
    x, outside = torch.ones(1, N, D), torch.tensor([index])
    for call in (
        lambda: take_rows(x, outside),
        lambda: add_rows(torch.ones(1, 2, D), outside, N),
        lambda: placed_gelu(x, outside, torch.ones(K, D), torch.zeros_like(outside)),
    ):
        with pytest.raises(IndexError, match=f"within -?[01]..{N - 1}"):
            call()


def test_what_is_all_but_impossible_costs_what_it_should():
    logits = torch.zeros(1, 258)
    logits[0, 0] = 200.0
    torch.testing.assert_close(softmax_nats(logits, torch.tensor([1])), torch.tensor([200.0]))
