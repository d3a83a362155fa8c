"""The exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Average(AveragedModel):
    """torch's, with a decay that warms up as (1 + n) / (10 + n), of the weights that are trained.

    Those that are not are as they were, and so are their averages.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        self.trained = [(averaged, current) for averaged, current in pairs if current.requires_grad]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Fold in the weights as they are now; buffers are copied."""
        n = int(self.n_averaged)
        # all of the first: what it was made from may have been replaced since
        share = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        averaged, current = zip(*self.trained, strict=True)
        torch._foreach_lerp_(averaged, current, share)
        for kept, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
        self.n_averaged += 1
