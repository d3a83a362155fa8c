"""Every faster form is its plain formula: values and gradients, with C++ kernels and without; threads, bad numbers."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from conftest import plain_only, without_kernels
from torch import Tensor

from hldm.kernels import forms
from hldm.kernels.forms import FORMS
from hldm.model import ops
from hldm.model.ops import (
    add_rms_norm,
    causal_conv,
    gelu_gate,
    linear_scan,
    rg_lru,
    rms_norm,
)

T, D, K, H = 41, 24, 6, 3  # positions, width, taps, heads
Operation = Callable[..., Tensor | tuple[Tensor, ...]]
NAMES = (
    *("linear_scan", "rg_lru", "rg_lru, saturated", "causal_conv", "gelu_gate", "rms_norm", "add_rms_norm"),
    "the norm alone",
)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def unit(size: float, b: int) -> tuple[Operation, list[Tensor]]:
    """The RG-LRU where documents start here and there; size: of the gates' logits."""
    reset = torch.zeros(b, T).masked_fill(torch.rand(b, T) < 0.1, -math.inf)
    inputs = [drawn(b, T, D), size * drawn(H, D // H, 2 * D // H), drawn(2, H, D // H), -drawn(D).square()]
    return lambda x, w, bias, radius, h0: rg_lru(x, w, bias, radius, reset.to(x), h0), [*inputs, drawn(b, D)]


def case(name: str, b: int) -> tuple[Operation, list[Tensor]]:
    """A function of tensors, and tensors to try it on."""
    torch.manual_seed(0)
    inside = (torch.rand(b, T, K) < 0.8).double()
    inside[..., -1] = 1
    norm = [3 * drawn(b, T, D), drawn(b, T, D), drawn(D)]
    cases: dict[str, tuple[Operation, list[Tensor]]] = {
        "linear_scan": (linear_scan, [drawn(b, T, D).sigmoid(), drawn(b, T, D), drawn(b, D)]),
        "rg_lru": unit(1.0, b),
        "rg_lru, saturated": unit(30.0, b),  # decays that round to 1
        "causal_conv": (
            lambda x, taps, weight, bias: causal_conv(x, taps, weight, bias, inside.to(x)),
            [drawn(b, T, D), drawn(b, K - 1, D), drawn(K, D), drawn(D)],
        ),
        "gelu_gate": (gelu_gate, [3 * drawn(b, T, D), drawn(b, T, D)]),
        "rms_norm": (lambda x, scale: rms_norm(x, scale, 1e-6), [3 * drawn(b, T, D), drawn(D)]),
        "add_rms_norm": (lambda x, y, scale: add_rms_norm(x, y, scale, 1e-6), norm),
        "the norm alone": (lambda x, y, scale: add_rms_norm(x, y, scale, 1e-6)[1], norm),
    }
    return cases[name]


def measure(function: Operation, inputs: list[Tensor]) -> list[Tensor]:
    """Values, and gradients of a sum of them with weights of their own."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    values = [out] if isinstance(out, Tensor) else list(out)
    loss = sum(((y * y.detach().cos()).sum() for y in values), start=torch.zeros(()))
    return [*values, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_form_is_its_plain_formula(name, dtype, kernels):
    function, inputs = case(name, b=3)
    inputs = [x.to(dtype) for x in inputs]
    with nullcontext() if kernels else without_kernels():
        ours = measure(function, inputs)
    with plain_only():
        plain = measure(function, inputs)
        exact = measure(function, [x.double() for x in inputs])
    for found, other, truth in zip(ours, plain, exact, strict=True):
        assert found.isfinite().all()
        scale = truth.abs().max().item() + 1
        if dtype == torch.float64:
            torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11 * scale)
        # no further from the truth than the plain formula is, give or take
        off, others = ((part.double() - truth).abs().max().item() for part in (found, other))
        assert off <= 3 * others + 1e-6 * scale


def test_forms_take_what_the_plain_ones_take():
    marked = [x for x in vars(ops).values() if inspect.isfunction(x) and hasattr(x, "__wrapped__")]
    assert len(marked) == 6 and all(plain in FORMS for plain in marked)
    for plain, form in FORMS.items():
        if not inspect.isclass(plain):
            taken, takes = (list(inspect.signature(function).parameters) for function in (plain, form))
            assert len(taken) == len(takes)


def test_what_the_forms_were_written_after_is_recorded():
    edited = [
        name for name, found in forms.code().items() if json.loads(forms.RECORD.read_bytes())[name] != found
    ]
    assert not edited, "change the faster forms alike, if need be, then: python -m hldm.kernels.forms"


@pytest.mark.parametrize("name", ["rg_lru", "model/denoiser.py"])
def test_an_edited_formula_is_the_one_that_runs(name, monkeypatch, tmp_path, caplog):
    record = tmp_path / "plain.json"
    found = forms.code()
    record.write_text(json.dumps(found | {name: "another"}))
    monkeypatch.setattr(forms, "code", lambda: found)
    monkeypatch.setattr(forms, "RECORD", record)
    left_out = {plain.__name__ for plain in FORMS.keys() - forms.current().keys()}
    assert left_out == {"make_writer"} | ({name} & {"rg_lru"})
    assert caplog.text.count("\n") == 1 and f"{name}: edited since" in caplog.text


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
    x = torch.ones(2, 8)
    x[0, 3] = bad
    y = rms_norm(x, torch.zeros(8), 1e-6)
    assert not y[0].isfinite().all() and y[1].isfinite().all()
