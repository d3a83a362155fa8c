"""The scan on a GPU: right against the loop, its speed, and whether training will use it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hldm.model import ops
from hldm.runs.clock import timed
from hldm.studies.gpu_card import Card, Skipped, dtype_name, relative_error


def _scan_of(card: Card) -> tuple[str, Callable[..., tuple[Tensor, Tensor]]]:
    """The form under test; Triton's own errors are not hidden, as they are in training."""
    from hldm.kernels import scan

    if not card.is_gpu:
        return "chunked torch", scan.ChunkedScan.apply
    from hldm.kernels.triton_scan import OnePassScan

    return "Triton", OnePassScan.apply


def _scan_inputs(card: Card, b: int, t: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Decays near 1, as models learn them, some exactly 0, as where documents start; inputs; a state."""
    generator = torch.Generator().manual_seed(0)
    decay = 1 - torch.rand(b, t, d, generator=generator) ** 3 * 0.5
    decay[:, t // 3 :: t // 3 + 1] = 0
    x, h0 = torch.randn(b, t, d, generator=generator), torch.randn(b, d, generator=generator)
    return [part.to(card.device, dtype).requires_grad_() for part in (decay, x, h0)]


def _gradients(scan: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    states, last = scan(*inputs)
    return list(torch.autograd.grad(states.sin().sum() + last.square().sum(), inputs))


def scan(card: Card) -> tuple[str, dict[str, Any]]:
    """The scan against the loop, in float32 and as a model trained in bfloat16 calls it; and its speed."""
    name, form = _scan_of(card)
    loop = inspect.unwrap(ops.scan)
    shape = (3, 200, 130) if card.is_gpu else (2, 40, 9)
    errors = {}
    with torch.no_grad():
        exact = _scan_inputs(card, *shape, torch.float32)
        errors["float32"] = relative_error(form(*exact)[0], loop(*exact)[0], torch.float32)
        rounded = _scan_inputs(card, *shape, torch.bfloat16)
        # states are computed in float32 and returned in the dtype of the input
        states, _ = ops.linear_scan(*rounded)
        assert states.dtype == torch.bfloat16
        errors["bfloat16"] = relative_error(states, loop(*(x.float() for x in rounded))[0], torch.bfloat16)
        data, width = card.config.data, card.config.autoencoder.encoder.width
        large = _scan_inputs(card, min(data.lanes, 16), data.window_bytes, width, torch.float32)
        seconds = min(timed(lambda: form(*large))[1] for _ in range(5))
        by_loop = min(timed(lambda: loop(*large))[1] for _ in range(2))
    rate = 3 * large[0].nbytes / seconds / 1e9  # two are read, one is written
    found = {
        "form": name,
        "errors": errors,
        "gigabytes_per_second": rate,
        "times_the_loop": by_loop / seconds,
    }
    said = ", ".join(f"{error:.1g} in {dtype}" for dtype, error in errors.items())
    return (
        f"{name} against the loop: off by {said}; {rate:,.3g} GB/s, {by_loop / seconds:.3g} x the loop",
        found,
    )


def gradients(card: Card) -> tuple[str, dict[str, Any]]:
    """Those of the scan against the loop's, in float32 and float64."""
    name, form = _scan_of(card)
    errors = {}
    for dtype in (torch.float32, torch.float64):
        inputs = _scan_inputs(card, *((3, 200, 130) if card.is_gpu else (2, 40, 9)), dtype)
        pairs = zip(_gradients(form, inputs), _gradients(inspect.unwrap(ops.scan), inputs), strict=True)
        errors[dtype_name(dtype)] = max(relative_error(one, other, dtype) for one, other in pairs)
    said = ", ".join(f"{error:.1g} in {dtype}" for dtype, error in errors.items())
    return f"{name} against the loop: off by {said}", {"form": name, "errors": errors}


def kernel_choice(card: Card) -> tuple[str, dict[str, Any]]:
    """Whether training itself will use Triton here: it trusts it only after a comparison of its own."""
    from hldm.kernels.scan import runs_in_triton

    if not card.is_gpu:
        raise Skipped("Triton needs CUDA")
    if not runs_in_triton(torch.zeros(1, device=card.device)):
        raise AssertionError("Triton is not trusted on this card, so training scans in torch")
    return "training scans in Triton", {}
