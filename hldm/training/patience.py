"""Which validation of a training was the best so far, with its weights, and when to wait for a better one no longer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Patience:
    """Holds the best weights of a stage; spent after so many validations in a row that were not better.

    Every rank holds the same. Saved with each checkpoint, so that a resumed run stops where it would have.
    """

    def __init__(self, limit: int):
        """limit: validations; 0 keeps no weights and is never spent."""
        self.limit = limit
        self.bits = math.inf  # of the best validation
        self.step = 0  # after which it was
        self.waited = 0  # validations since
        self.weights: dict[str, Tensor] = {}

    @property
    def is_spent(self) -> bool:
        """Whether training stops early."""
        return 0 < self.limit <= self.waited

    def add(self, step: int, bits: float, weights: Mapping[str, Tensor]) -> None:
        """Regard the validation after a step, of these weights. One that is not finite is not better."""
        if not self.limit:
            return
        if bits < self.bits:
            self.bits, self.step, self.waited = bits, step, 0
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        else:
            self.waited += 1

    def lines(self, steps: int) -> list[str]:
        """What a user should know at the end of a training of so many steps."""
        waited = f"{self.waited} validation{'s' if self.waited > 1 else ''}"
        said = [f"stopped after {steps} steps: {waited} without a better one"]
        kept = f"kept the weights after step {self.step}, which validated at {self.bits:.3f} bits/char"
        return said[: self.is_spent] + [kept][: bool(self.weights)]

    @property
    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {"step": self.step, "waited": self.waited, "bits": self.bits if self.weights else None}

    def restore(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's state and the weights that it holds."""
        if self.limit and state["bits"] is not None:
            self.bits, self.step, self.waited = state["bits"], state["step"], state["waited"]
            self.weights = {name: tensor.clone() for name, tensor in weights.items()}
