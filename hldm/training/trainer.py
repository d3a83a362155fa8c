"""One loop for every stage: optimizer steps over windows, resumable to the bit.

Knows no model: an objective is any module whose forward takes (batch, carry, generator, progress) and
returns a loss per byte of the *global* batch. Rows of that batch are split over ranks and
micro-batches; noise, order and learning rate are functions of (seed, step), so the split changes
nothing but rounding. hldm.runs.checkpoints saves, accelerate sees to processes and devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hldm.config import CheckpointConfig, ConfigError, LoggingConfig, TrainingConfig
from hldm.model.state import map_carry, named_tensors
from hldm.model.vitals import complaints
from hldm.runs.checkpoints import (
    Checkpoint,
    flatten_optimizer,
    newest_checkpoint,
    save_checkpoint,
    unflatten_optimizer,
)
from hldm.runs.clock import clock_named
from hldm.runs.cores import Cores
from hldm.runs.exits import Interrupted
from hldm.runs.folder import Run, Totals
from hldm.runs.health import nonfinite_names
from hldm.runs.progress import ALONE, Part, Progress, Recent
from hldm.runs.ranks import largest_of_ranks
from hldm.runs.signals import Interrupt, Stopped
from hldm.text.windows import Batch, Windows
from hldm.training.anomalies import Anomalies, Complaints, TrainingDiverged
from hldm.training.environment import wrapped
from hldm.training.optimizers import CLIP_NORM, make_average, make_optimizers, set_rates
from hldm.training.patience import Patience
from hldm.training.stream import StreamedWindows, gathered
from hldm.training.validations import Measure, Validations

COUNTED = ("seconds", "characters", "prepared")  # of the totals, what a checkpoint carries
CLIP_EPS = 1e-6  # what torch's clipping adds to the norm
MAX_SKIPPED_STEPS = 3  # non-finite steps in a row before a run gives up


def step_seed(seed: int, step: int, stream: int) -> int:
    """A seed that is a pure function of (run seed, optimizer step, stream)."""
    return int(np.random.SeedSequence((seed, step, stream)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Trainer:
    """Everything one stage needs between two optimizer steps."""

    def __init__(
        self,
        objective: Any,
        windows: Windows | StreamedWindows,
        config: TrainingConfig,
        *,
        run: Run,
        seed: int,
        checkpoint: CheckpointConfig,
        logging: LoggingConfig,
        accelerator: Accelerator,
        extras: dict[str, Any] | None = None,
        spent: float = 0.0,
        part: Part = ALONE,
        complaints: Complaints = complaints,
        decay_growth: float = 1.0,
    ):
        """extras: JSON that every checkpoint carries, and that must be the same on resume;  spent: seconds before.

        part: which of the trainings that were asked for, for what is shown
        complaints: what the objective's signs of life say is dead, a line each
        decay_growth: weight decay at the end over that at the start
        """
        self.config, self.checkpoint, self.logging = config, checkpoint, logging
        self.run, self.seed, self.windows, self.accelerator = run, seed, windows, accelerator
        self.extras = {"seed": seed, **(extras or {})}
        ranks, parts = accelerator.num_processes, config.accumulation
        if windows.lanes % (ranks * parts):
            raise ConfigError(
                f"data.lanes must be divisible by processes x accumulation, got {windows.lanes} lanes, "
                f"{ranks} processes, accumulation {parts}"
            )
        self.rows = windows.lanes // (ranks * parts)
        self.part = part
        objective.to(accelerator.device)
        self.objective = objective
        self.average = make_average(objective, config.ema_decay) if config.ema_decay else None
        self.optimizers = make_optimizers(objective, config)
        self.model = wrapped(accelerator, objective)
        self.carries = [objective.initial_carry(self.rows, accelerator.device) for _ in range(parts)]
        self.decay_growth = decay_growth
        self.totals = Totals(seconds=spent, prepared=spent)
        self.recent = Recent()
        self.patience = Patience(config.patience)
        self.validations = Validations(run, config, accelerator, self.patience)
        self.anomalies = Anomalies(complaints, logging.every)
        self.cores = Cores(torch.get_num_threads() if accelerator.device.type == "cpu" else 1)

    # --- state on disk -------------------------------------------------------------------------

    def save(self, say: Callable[[str], None]) -> str:
        """Write a checkpoint of everything that the next step depends on; returns its path.

        Raises TrainingDiverged rather than save weights, or their average, that are not finite.
        """
        models = [self.objective] if self.average is None else [self.objective, self.average.module]
        bad = [name for model in models for name in nonfinite_names(model.state_dict().items())]
        if largest_of_ranks(len(bad), self.accelerator.device):
            raise self._diverged(f"weights are not finite after step {self.totals.steps}", bad)
        parts = [dict(named_tensors(carry)) for carry in self.carries]
        carry = {}
        for name in parts[0]:
            # this rank's rows in order, then the ranks in order: the rows of the global batch
            own = torch.cat([part[name] for part in parts])
            carry[name] = self.accelerator.gather(own.contiguous()).cpu()
        stream = gathered(self.accelerator, self.windows.cursor())
        path = ""
        if self.accelerator.is_main_process:
            tensors = {"model": self.objective.state_dict(), "carry": carry, **stream}
            groups = []
            for index, optimizer in enumerate(self.optimizers):
                tensors[f"optimizer-{index}"], own_groups = flatten_optimizer(optimizer.state_dict())
                groups.append(own_groups)
            if self.average is not None:
                tensors["average"] = self.average.state_dict()
            if self.patience.weights:
                tensors["best"] = self.patience.weights
            state = {
                **{name: getattr(self.totals, name) for name in COUNTED},
                "optimizers": groups,
                "threads": torch.get_num_threads(),
                "processes": self.accelerator.num_processes,
                **self.anomalies.state,
                "validated": self.validations.step,
                "patience": self.patience.state,
                **self.extras,
            }
            folder, keep = self.run.folder, self.checkpoint.keep
            path = str(save_checkpoint(folder, self.totals.steps, tensors, state, keep=keep, say=say))
        self.accelerator.wait_for_everyone()
        return path

    def restore(self, say: Callable[[str], None]) -> bool:
        """Go on from the newest good checkpoint; False when there is none."""
        saved = newest_checkpoint(self.run.folder, say=say)
        if saved is None:
            return False
        states = [
            unflatten_optimizer(saved.tensors[f"optimizer-{index}"], groups)
            for index, groups in enumerate(saved.state["optimizers"])
        ]
        self._check(saved, states, say)
        self.windows.seek(saved.step, saved.tensors.get("stream", {}))
        self.objective.load_state_dict(saved.tensors["model"])
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(saved.tensors["average"])
        rank, parts = self.accelerator.process_index, self.config.accumulation
        for part in range(parts):
            first = (rank * parts + part) * self.rows
            self.carries[part] = map_carry(torch.clone, self.carries[part])  # no two share memory
            for name, tensor in named_tensors(self.carries[part]):
                tensor.copy_(saved.tensors["carry"][name][first : first + self.rows])
        self.anomalies.restore(saved.state)
        self.validations.step = saved.state.get("validated", -1)
        self.patience.restore(saved.state.get("patience", {"bits": None}), saved.tensors.get("best", {}))
        self.totals = Totals(saved.step, **{name: saved.state.get(name, 0) for name in COUNTED})
        return True

    def _check(self, saved: Checkpoint, states: list[dict[str, Any]], say: Callable[[str], None]) -> None:
        """Refuse what cannot be continued before anything is changed; mention what may differ."""
        for key, value in self.extras.items():
            if saved.state.get(key) != value:
                raise ConfigError(
                    f"{saved.path} was trained with {key} {saved.state.get(key)}, this run has {value}: "
                    "resume with what it was trained with, or choose another --name"
                )
        groups = [
            [[len(group["params"]) for group in state["param_groups"]] for state in some]
            for some in (states, [optimizer.state_dict() for optimizer in self.optimizers])
        ]
        if groups[0] != groups[1] or ("average" in saved.tensors) != (self.average is not None):
            raise ConfigError(
                f"{saved.path} was trained with another optimizer or ema_decay (0 or not): "
                "resume with what it was trained with, or choose another --name"
            )
        expected, found = self.objective.state_dict(), saved.tensors["model"]
        for name in expected.keys() | found.keys():
            shapes = [tuple(d[name].shape) if name in d else None for d in (expected, found)]
            if shapes[0] != shapes[1]:
                raise ConfigError(
                    f"{saved.path}: {name} has shape {shapes[1]}, the config makes it {shapes[0]}"
                )
        if saved.state["threads"] != torch.get_num_threads():
            say(
                f"resuming with {torch.get_num_threads()} threads instead of {saved.state['threads']}: "
                "sums round differently, so the weights will not be bit-equal to an uninterrupted run's"
            )

    # --- one step ------------------------------------------------------------------------------

    def step(self, progress: float) -> dict[str, float] | None:
        """One optimizer step over all rows: what to log; None when it was skipped as non-finite."""
        accelerator, parts, step = self.accelerator, self.config.accumulation, self.totals.steps
        rate = set_rates(self.optimizers, self.config, self.decay_growth, progress)
        torch.manual_seed(step_seed(self.seed, step, 1 + accelerator.process_index))  # of one's own parts
        sums: dict[str, Tensor] = {}
        for part in range(parts):
            first = (accelerator.process_index * parts + part) * self.rows
            batch: Batch = self.windows.batch(step, first, self.rows).to(accelerator.device)
            generator = torch.Generator().manual_seed(step_seed(self.seed, step, 0))
            last = part == parts - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    out = self.model(batch, self.carries[part], generator, progress)
                # DDP averages gradients over ranks; the loss is a share of the global sum
                accelerator.backward(out.loss * accelerator.num_processes)
            self.carries[part] = out.carry
            for name, value in {**out.nats, "characters": out.characters}.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.cpu().double()
        names = list(sums)
        total = accelerator.reduce(torch.stack([sums[name] for name in names]).to(accelerator.device))
        given = [p for p in self.objective.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in given if p.grad is not None])
        values = dict(zip(names, total.tolist(), strict=True))
        characters = values.pop("characters")
        finite = math.isfinite(sum(values.values())) and math.isfinite(float(norm))
        self.objective.end_step(skipped=not finite)
        if finite:
            if float(norm) + CLIP_EPS > CLIP_NORM:  # else it would multiply by 1
                clip_grads_with_norm_(given, CLIP_NORM, norm)
            for optimizer in self.optimizers:
                optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.objective)
            self.anomalies.skipped = []
        else:
            rows = self.windows.places(step)
            self.anomalies.note_skipped(step + 1, rows, values, float(norm), rate, self.objective)
            self.carries = [self.objective.initial_carry(self.rows, accelerator.device) for _ in range(parts)]
        for parameter in given:
            parameter.grad = None
        self.totals = replace(
            self.totals, steps=step + 1, characters=self.totals.characters + int(characters)
        )
        if not finite:
            return None
        metrics = {"learning_rate": rate, "gradient_norm": float(norm)}
        return metrics | self.recent.add(values, characters)

    # --- the loop ------------------------------------------------------------------------------

    def progress(self) -> float:
        """Share of the training done: by steps, or by the clock of rank 0 when that is further.

        What was spent before the first step leaves fewer minutes, but a schedule that begins at its beginning: a
        segmenter's minute counted as progress skipped the warm-up, and training fell apart.
        """
        by_steps = self.totals.steps / self.config.steps
        if not self.config.minutes:
            return by_steps
        left = 60 * self.config.minutes - self.totals.prepared
        done = (self.totals.seconds - self.totals.prepared) / left if left > 0 else 1.0
        share = torch.tensor(done, dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            share = share.to(self.accelerator.device)
            torch.distributed.broadcast(share, src=0)
        return max(by_steps, float(share))

    def fit(
        self,
        say: Callable[[str], None],
        on_sample: Callable[[nn.Module], str] | None = None,
        on_validate: Measure | None = None,
    ) -> Totals:
        """Train to the end; returns the totals, with averaged weights, or the best, left in the objective.

        on_sample: called every `logging.sample_every` steps, and at the end, on the averaged model
        on_validate: the same, when hldm.training.validations says: its bits a character, the `bound` and its terms
        Raises Interrupted after saving when a signal came, TrainingDiverged on non-finite numbers.
        """
        clock = clock_named(self.config.clock)
        began = clock() - self.totals.seconds
        self.model.train()
        with (
            Interrupt() as interrupt,
            Progress(self.run.folder, self.part, say, live=self.accelerator.is_main_process) as bar,
        ):
            if self.totals.steps == 0:
                self._validate(on_validate, bar, 0.0)
            elif on_validate:
                self.validations.resume(self.progress())
            metrics: dict[str, float] | None = None
            while (progress := self.progress()) < 1 and not self.patience.is_spent:
                metrics = self.step(progress)
                seconds = clock() - began
                self.totals = replace(self.totals, seconds=seconds)
                step = self.totals.steps
                if metrics is None:
                    say(f"step {step}: loss or gradient is not finite; step skipped")
                    self.run.log(step, event="skipped: not finite")
                    if (skipped := len(self.anomalies.skipped)) > MAX_SKIPPED_STEPS:
                        raise self._diverged(
                            f"{skipped} steps in a row were not finite (the last is {step})",
                            nonfinite_names(self.objective.state_dict().items()),
                        )
                else:
                    self.anomalies.note_spike(step, metrics["gradient_norm"], self.run, say)
                    rate = self.totals.characters / max(seconds, 1e-9)
                    metrics |= {"characters_per_second": rate, "seconds": seconds}
                    if step % self.logging.every == 0 and self.accelerator.is_main_process:
                        signs: dict[str, float] = self.objective.signs()
                        self.anomalies.note_deaths(step, signs, progress, self.run, say)
                        metrics |= signs
                        self.run.log(step, characters=self.totals.characters, **metrics)
                        self.accelerator.log(metrics, step=step)
                    progress = self.progress()
                    if self.validations.is_due(step, progress):
                        self._validate(on_validate, bar, progress)
                    bar.advance(step, self.progress(), metrics, every=self.logging.every)
                    if step % self.logging.every == 0:
                        self.recent = Recent()
                self.cores.look(say)
                if step % self.checkpoint.every == 0 and not self.anomalies.skipped:
                    self.save(say)
                if on_sample and self.logging.sample_every and step % self.logging.sample_every == 0:
                    self._sample(on_sample, interrupt)
                self._stop_if_asked(interrupt, lambda: self.save(say))
            if not self.totals.steps:
                raise ConfigError(
                    f"{self.run.folder}: no step was taken, for what came before took {self.totals.prepared:.0f} s of "
                    f"{self.config.minutes:g} minutes: give it more"
                )
            for line in self.anomalies.complaints(self.objective.signs()).values():
                say(f"at the end: {line}")
            self._validate(on_validate, bar, 1.0)
            if metrics:  # what the last validation found, and nothing again
                bar.advance(self.totals.steps, 1.0, metrics, every=self.totals.steps + 1)
            path = self.save(say)
            for line in self.patience.lines(self.totals.steps):
                say(line)
            if self.patience.weights:
                self.objective.load_state_dict(self.patience.weights)
            elif self.average is not None:
                self.objective.load_state_dict(self.average.module.state_dict())
            if on_sample:
                self._sample(on_sample, interrupt, averaged=False)
            self._stop_if_asked(interrupt, lambda: path)
        return self.totals

    def _sample(
        self, on_sample: Callable[[nn.Module], str], interrupt: Interrupt, averaged: bool = True
    ) -> None:
        if self.accelerator.is_main_process and not interrupt.requested:
            model = self.average.module if averaged and self.average is not None else self.objective
            model.eval()
            # A signal ends the sample, which is not worth waiting for; the step's end then sees to it.
            with suppress(Stopped), Interrupt(raises=True), torch.no_grad():
                self.run.sample(self.totals.steps, on_sample(model))
            self.objective.train()
        self.accelerator.wait_for_everyone()

    def _validate(self, measure: Measure | None, bar: Progress, progress: float) -> None:
        """Measure the averaged model on held-out text."""
        average = None if self.average is None else self.average.module
        self.validations.make(measure, self.objective, average, bar, self.totals, progress)

    def _diverged(self, reason: str, weights: list[str]) -> TrainingDiverged:
        """The error to raise. weights: names of those that are not finite."""
        return self.anomalies.diverged(reason, weights, self.totals.steps, self.seed, self.run)

    def _stop_if_asked(self, interrupt: Interrupt, saved: Callable[[], str]) -> None:
        """Raise Interrupted on all ranks if a signal came to any. saved: the checkpoint to go on from."""
        if signum := largest_of_ranks(interrupt.requested or 0, self.accelerator.device):
            raise Interrupted(signum, saved())
