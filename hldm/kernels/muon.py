"""Muon as torch has it, its Newton-Schulz iterations over many matrices of one shape at a time.

A model holds many small matrices, each of which would cost a handful of small products an iteration: in batches they
take a third of the time on a CPU (measured, 128 wide). They run in bfloat16, as torch's do, but where a CPU has no
products of it. States are those of torch.optim.Muon, so checkpoints are, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NUMBERS_AT_ONCE = 2**20  # about what a core's second cache holds; larger matrices go one by one


class Muon(torch.optim.Muon):
    """Momentum, made orthogonal (Jordan et al. 2024), as the update of a matrix; options are torch's.

    A step uses the gradients up: they hold what is then made orthogonal.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every matrix that has a gradient, as torch.optim.Muon takes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params, grads = [], []
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        if not params:
            return
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        if group["nesterov"]:
            torch._foreach_lerp_(grads, buffers, group["momentum"])
        updates = grads if group["nesterov"] else buffers
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        batches: dict[tuple[torch.Size, torch.device], list[int]] = {}
        for place, p in enumerate(params):
            batches.setdefault((p.shape, p.device), []).append(place)
        for (shape, device), places in batches.items():
            rate = group["lr"] * rate_for(shape, group["adjust_lr_fn"])
            size = max(NUMBERS_AT_ONCE // shape.numel(), 1)
            for some in (places[first : first + size] for first in range(0, len(places), size)):
                batch = updates[some[0]].new_empty(len(some), *shape, dtype=dtype_on(device))
                torch._foreach_copy_(list(batch), [updates[place] for place in some])
                batch = orthogonalise(batch, group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_add_([params[place] for place in some], list(batch), alpha=-rate)


def dtype_on(device: torch.device) -> torch.dtype:
    """What the iterations run in: bfloat16, on a CPU without AVX-512 float32.

    There torch multiplies bfloat16 number by number: 15 times the time (measured, AVX2, 7 matrices of 160 by 360),
    and a whole step of configs/small-twin.yaml took three times as long.
    """
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return torch.float32
    return torch.bfloat16


def orthogonalise(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (k n m) with singular values near 1 in place of their own (Newton-Schulz, Jordan et al. 2024).

    x <- a x + b (x x^T) x + c (x x^T)^2 x, the product taken on the smaller side, in the dtype of x
    """
    a, b, c = coefficients
    is_tall = x.shape[1] > x.shape[2]
    # singular values of at most 1 to begin with
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x.mT, x) if is_tall else torch.bmm(x, x.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, gram, beta=a) if is_tall else torch.baddbmm(x, gram, x, beta=a)
    return x


def rate_for(shape: torch.Size, adjustment: str | None) -> float:
    """What torch.optim.Muon multiplies the learning rate of a matrix with, by its adjust_lr_fn."""
    rows, columns = shape
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
