"""When a model in training is measured on held-out text, and what becomes of the figures.

Every EVERY steps, at the start and at the end. A short run, or the beginning of a long one, would go
without for long: it is measured in between, too, by shares of the run, as far as that costs little.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from hldm.config import TrainingConfig
from hldm.runs.clock import clock_named
from hldm.runs.folder import Run, Totals
from hldm.runs.progress import Progress
from hldm.training.patience import Patience

EVERY = 250  # steps between validations: about 1 % of the time of those (docs/training.md)
DEAR = 0.05  # of a run's time: a validation that takes more is made at the start and the end alone
COST = 0.02  # of a run's time, at most, for what is measured in between
NEAREST, FARTHEST = 1 / 8, 1 / 3  # shares of a run between two validations


def spacing(seconds: float, in_all: float | None) -> float:
    """Share of a run until the next validation in between.

    seconds: that one validation takes;  in_all: those of the run; None: not known yet
    At FARTHEST there are two of them in a run, at more than COST if need be; infinite where one alone is DEAR.
    """
    if in_all is None:
        return FARTHEST
    if seconds > DEAR * in_all:
        return math.inf
    return min(max(seconds / (COST * in_all), NEAREST), FARTHEST)


# bits a character of an objective: the `bound` and its terms
Measure = Callable[[nn.Module], dict[str, float]]


class Validations:
    """Those of one training. Every rank makes each after the same step; the main process measures."""

    def __init__(
        self,
        run: Run,
        config: TrainingConfig,
        accelerator: Accelerator,
        patience: Patience,
    ):
        """patience: regards those that are made every so many steps, which a resumed run makes after the same ones."""
        self.run, self.accelerator, self.patience = run, accelerator, patience
        self.every = EVERY
        self.minutes, self.clock = config.minutes, clock_named(config.clock)
        self.step = -1  # of the last one
        self.due = math.inf  # progress at which the next in between is made

    def is_due(self, step: int, progress: float) -> bool:
        """Whether one is made after this step, in between or not."""
        return self._is_regular(step) or self.due <= progress < 1

    def _is_regular(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def resume(self, progress: float) -> None:
        """Go on from a checkpoint: when the last one was made is not known by the clock."""
        self.due = progress + FARTHEST

    def make(
        self,
        measure: Measure | None,
        objective: nn.Module,
        average: nn.Module | None,
        bar: Progress,
        totals: Totals,
        progress: float,
    ) -> None:
        """Measure the averaged model, once after a step. It is waited for, signal or not.

        progress: share of the run that is done
        """
        step = totals.steps
        if measure is None or not self.every or self.step == step:
            return
        model = objective if average is None else average
        device = self.accelerator.device
        shared = torch.zeros(2, dtype=torch.float64, device=device)  # bits, share until the next
        if self.accelerator.is_main_process:
            began = self.clock()
            model.eval()
            found = measure(model)
            objective.train()
            # patience waits for what counts
            shared[0] = found.get("answer", found["bound"])
            shared[1] = spacing(self.clock() - began, self._seconds_in_all(totals, progress))
            terms = {f"validation_{name}": value for name, value in found.items()}
            self.run.log(step, event="validation", **terms)
            self.accelerator.log({"validation_bound": found["bound"]}, step=step)
            bar.validated(found, step)
        bits, share = self.accelerator.reduce(shared).tolist()
        self.step, self.due = step, progress + share
        if self._is_regular(step) or progress == 1:
            self.patience.add(step, bits, model.state_dict())

    def _seconds_in_all(self, totals: Totals, progress: float) -> float | None:
        """Of the steps of a run, by its minutes or by those that are done; None before the first where steps count."""
        if self.minutes:
            return 60 * self.minutes - totals.prepared
        return (totals.seconds - totals.prepared) / progress if progress else None
