"""The plain formulas at their edges; tests/kernels/test_forms.py holds their faster forms to them."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import plain_only

from hldm.model.ops import (
    MAX_SQRT_GRADIENT,
    linear_scan,
    rg_lru,
    softmax_nats,
    sqrt_with_bounded_gradient,
)


@pytest.fixture(autouse=True)
def plain():
    with plain_only():
        yield


def test_the_gradient_of_the_square_root_is_bounded():
    x = torch.tensor([0.0, -0.0, 1e-12, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
    y = sqrt_with_bounded_gradient(x)
    torch.testing.assert_close(y, x.sqrt(), rtol=0, atol=0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.tolist() == [MAX_SQRT_GRADIENT, MAX_SQRT_GRADIENT, MAX_SQRT_GRADIENT, 1.0, 0.5]


def test_a_document_start_forgets_the_past_and_takes_its_input_whole():
    torch.manual_seed(0)
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    parts = [x, *(torch.randn(shape, dtype=torch.float64) for shape in ((2, 2, 4), (2, 2, 2), (4,), (1, 4)))]
    x, weight, bias, radius, h0 = (part.requires_grad_() for part in parts)
    reset = torch.zeros(1, 9, dtype=torch.float64)
    reset[0, 3] = -math.inf
    h, last = rg_lru(x, weight, bias, -radius.square(), reset, h0)
    alone, _ = rg_lru(x[:, 3:], weight, bias, -radius.square(), reset[:, 3:], torch.zeros_like(h0))
    torch.testing.assert_close(h[:, 3:], alone, rtol=0, atol=0)
    # equation 2 with sqrt(1 - 0) = 1
    logits = torch.einsum("hw,hwu->hu", x[0, 3].view(2, 2), weight[..., :2]) + bias[0]
    torch.testing.assert_close(h[0, 3], logits.sigmoid().flatten() * x[0, 3])
    found = torch.autograd.grad(last.sum(), [x, weight, bias, radius, h0])
    assert all(part.isfinite().all() for part in found) and not found[4].any() and not found[0][:, :3].any()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (2, 3, 5), (2, 4)), "share a shape"),
        (((2, 0, 4), (2, 0, 4), (2, 4)), "at least one step"),
        (((2, 3, 4), (2, 3, 4), (2, 3)), "h0 must have shape"),
    ],
)
def test_a_wrong_scan_says_what_is_wrong(shapes, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(*(torch.zeros(shape) for shape in shapes))


def test_what_is_all_but_impossible_costs_what_it_should():
    logits = torch.zeros(1, 258)
    logits[0, 0] = 200.0
    torch.testing.assert_close(softmax_nats(logits, torch.tensor([1])), torch.tensor([200.0]))
