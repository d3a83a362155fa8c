"""Numbers going wrong: what is not finite, which gradients are out of the ordinary. Knows no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

import torch
from torch import Tensor, nn


def nonfinite_names(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of those that hold a nan or an infinity."""
    return [name for name, tensor in tensors if tensor is not None and not bool(torch.isfinite(tensor).all())]


def gradients(model: nn.Module) -> list[tuple[str, Tensor | None]]:
    """Parameters' gradients by name; None where there is none."""
    return [(name, parameter.grad) for name, parameter in model.named_parameters()]


class Spikes:
    """Finds gradient norms that stand out from those of the steps before: above median + k MAD."""

    STEPS = 100  # remembered
    LEAST = 20  # before that many there is no telling what is ordinary
    K = 20.0  # ordinary steps stay below 4: measured, 85 first steps of configs/tiny.yaml, at most 3.1

    def __init__(self) -> None:
        self.norms: deque[float] = deque(maxlen=self.STEPS)

    def add(self, norm: float) -> float | None:
        """Remember a finite norm; the threshold when it lies above, else None."""
        threshold = None
        if len(self.norms) >= self.LEAST:
            middle = median(self.norms)
            spread = median(abs(norm - middle) for norm in self.norms)
            threshold = middle + self.K * spread
        self.norms.append(norm)
        return threshold if threshold is not None and norm > threshold else None
