"""What goes wrong in a training: steps that are not finite, gradients out of the ordinary, parts that died.

Each is logged and said; a training that cannot go on leaves post-mortem.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hldm.runs.checkpoints import checkpoints_in
from hldm.runs.exits import RunEnded
from hldm.runs.folder import Run, finite_or_text
from hldm.runs.health import Spikes, gradients, nonfinite_names
from hldm.runs.reports import save_report

YOUNG = 0.1  # of the progress: before it a model may yet come alive

Complaints = Callable[[dict[str, float]], dict[str, str]]


class TrainingDiverged(RunEnded):
    """Loss, gradient or weights are not finite, for good; nothing bad was saved."""

    exit_code = 3


class Anomalies:
    """Those of one training, remembered so that each is said once. A checkpoint carries what has been said."""

    def __init__(self, complaints: Complaints, every: int):
        """complaints: what the objective's signs of life say is dead, a line each;  every: steps between two lines."""
        self.complaints, self.every = complaints, every
        self.spikes = Spikes()
        self.quiet_until = 0  # step before which no more spikes are said
        self.quiet_signs: set[str] = set()  # of what is dead and has been said to be
        self.skipped: list[dict[str, Any]] = []  # what is known of the steps skipped in a row

    @property
    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {"gradient_norms": list(self.spikes.norms), "dead": sorted(self.quiet_signs)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state. Only what is said depends on it."""
        self.spikes.norms.extend(state.get("gradient_norms", []))
        self.quiet_signs.update(state.get("dead", []))

    def note_spike(self, step: int, norm: float, run: Run, say: Callable[[str], None]) -> None:
        """Log a gradient norm far above those before; it was clipped like any other."""
        threshold = self.spikes.add(norm)
        if threshold is not None:
            run.log(step, event="gradient spike", gradient_norm=norm, threshold=threshold)
            if step >= self.quiet_until:  # one line every so often, however many there are
                self.quiet_until = step + self.every
                said = f"step {step}: gradient norm {norm:.3g} stands out, usual is below {threshold:.3g}"
                say(f"{said}; more before step {self.quiet_until} are only logged")

    def note_deaths(
        self, step: int, signs: dict[str, float], progress: float, run: Run, say: Callable[[str], None]
    ) -> None:
        """A line when signs of life (`hldm.model.vitals`) say that something has died, and another if it dies again."""
        dead = self.complaints(signs) if progress >= YOUNG else {}
        for sign, line in dead.items():
            if sign not in self.quiet_signs:
                run.log(step, event=f"dead: {sign}")
                say(f"step {step}: {line}")
        self.quiet_signs = set(dead)

    def note_skipped(
        self,
        step: int,
        rows: list[Any],
        nats: Mapping[str, float],
        norm: float,
        learning_rate: float,
        objective: nn.Module,
    ) -> None:
        """Remember a step that is not finite, before its gradients are gone. rows: where each row's text begins."""
        self.skipped.append(
            {
                "step": step,
                "rows": rows,
                "nats": {name: finite_or_text(value) for name, value in nats.items()},
                "gradient_norm": finite_or_text(norm),
                "learning_rate": learning_rate,
                "gradients_not_finite": nonfinite_names(gradients(objective)),
            }
        )

    def diverged(self, reason: str, weights: list[str], step: int, seed: int, run: Run) -> TrainingDiverged:
        """The error to raise, after writing post-mortem.json. weights: names of those that are not finite."""
        saved = list(checkpoints_in(run.folder).values())
        last = str(saved[-1]) if saved else None
        path = run.folder / "post-mortem.json"
        record = {
            "reason": reason,
            "step": step,
            "seed": seed,
            "weights_not_finite": weights,
            "skipped_steps": self.skipped,  # rows: [document of the training text, byte of it] or null
            "last_checkpoint": last,
        }
        if run.is_main:
            save_report(path, record)
        return TrainingDiverged(
            f"{reason}: lower training's learning_rate; see {path}; the last checkpoint is {last or 'none'}"
        )
