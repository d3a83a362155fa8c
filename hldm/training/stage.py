"""What both stages of training share: the open run folder, the processes, fitting and saving."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import nn

from hldm.chunking.chunker import make_chunker
from hldm.chunking.segmenter import Segmenter
from hldm.chunking.strategies import cached_starts, read_segmenter
from hldm.config import (
    CheckpointConfig,
    ChunkingConfig,
    Config,
    ConfigError,
    DataConfig,
    LoggingConfig,
    StageConfig,
    TrainingConfig,
    to_dict,
)
from hldm.model.speed import why_plain
from hldm.model.vitals import complaints
from hldm.runs.checkpoints import checkpoints_in
from hldm.runs.clock import clock_named
from hldm.runs.exits import Interrupted
from hldm.runs.files import atomic_write, naming
from hldm.runs.folder import Run, Totals, check_run_name, open_run, write_totals
from hldm.runs.identity import MAY_CHANGE_ONCE_TRAINED, SHOWN
from hldm.runs.progress import ALONE, Part, in_minutes, say_line
from hldm.runs.ranks import RankLost, is_rank_failure, make_roll_call, missing_ranks
from hldm.runs.signals import Stopped
from hldm.settings import Dumpable, dotted
from hldm.sources.shards import open_source
from hldm.text.corpus import Corpus
from hldm.text.windows import Windows
from hldm.training.anomalies import Complaints
from hldm.training.environment import (
    check_launch,
    check_trackers,
    check_training,
    naming_variables,
    rounding_variables,
)
from hldm.training.segmenters import train_segmenter
from hldm.training.sizes import LABELS
from hldm.training.stream import StreamedWindows, agreement
from hldm.training.trainer import Trainer
from hldm.training.validations import Measure

MAY_CHANGE = (*MAY_CHANGE_ONCE_TRAINED, "training.")  # on resume
# How long ranks wait for one that hangs, or saves and samples alone (seconds); accelerate's default: 30 minutes. A rank
# that prepares a text alone says every few seconds that it is at work.
TIMEOUT_S = 300.0
SEGMENTER_SHARE = 0.2  # of stage one's minutes, at most, for what cuts its text


class RunSettings(Dumpable, Protocol):
    """What a stage reads of its settings: sections that those of every family have."""

    name: str
    seed: int
    data: DataConfig
    chunking: ChunkingConfig
    training: Any  # `of(stage)` is the TrainingConfig of a stage
    checkpoint: CheckpointConfig
    logging: LoggingConfig


@dataclass(frozen=True)
class Stage:
    """A stage that is open: its settings, its run folder, its processes."""

    config: RunSettings
    training: TrainingConfig
    run: Run
    accelerator: Accelerator
    say: Callable[[str], None]  # prints on the main process
    resume: bool
    opened: float  # what the clock of its training showed at the start
    part: Part  # which of the trainings that were asked for

    def fit(
        self,
        objective: nn.Module,
        windows: Any,
        on_sample: Callable[[nn.Module], str],
        on_validate: Measure | None = None,
        bound_to: dict[str, str] | None = None,
        complaints: Complaints = complaints,
        decay_growth: float = 1.0,
    ) -> Totals:
        """Train an objective from its start or newest checkpoint; `bound_to` must not change in between.

        The minutes count from the opening of the stage, so they include what it prepares, such as a segmenter.
        """
        config = self.config
        if self.training.patience and not on_validate:
            raise ConfigError(
                "training.patience needs validations: set autoencoder.components, without which latents have no "
                "cost (in Python: pass validation=)"
            )
        trainer = Trainer(
            objective,
            windows,
            self.training,
            run=self.run,
            seed=config.seed,
            checkpoint=config.checkpoint,
            logging=config.logging,
            accelerator=self.accelerator,
            extras={**windows.identity, **(bound_to or {})},
            spent=clock_named(self.training.clock)() - self.opened,
            part=self.part,
            complaints=complaints,
            decay_growth=decay_growth,
        )
        if self.resume:
            trainer.restore(self.say)
            self.run.rewind(trainer.totals.steps or -1, trainer.validations.step)
            self.say(f"resuming {self.run.folder} at step {trainer.totals.steps}")
        self._say_what_is_trained(objective)
        if config.logging.trackers:
            self.accelerator.init_trackers(config.name, config=_plain_settings(config))
        with closing(windows):
            totals = trainer.fit(self.say, on_sample, on_validate)
        objective.eval()
        return totals

    def _say_what_is_trained(self, objective: nn.Module) -> None:
        """Where, for how long, and with what."""
        trained = [(name, part) for name, part in objective.named_children() if part.training]
        sizes = ", ".join(
            f"{LABELS.get(name, name)} {sum(p.numel() for p in part.parameters()):,}"
            for name, part in trained
        )
        data, accelerator, threads = self.config.data, self.accelerator, torch.get_num_threads()
        several = accelerator.num_processes > 1
        processes = f"{accelerator.num_processes} processes" if several else "1 process"
        threads_of = f"{threads} thread{'s' if threads > 1 else ''}{' each' if several else ''}"
        precision = "" if self.training.mixed_precision == "no" else f", {self.training.mixed_precision}"
        self.say(f"{self.part}: {self.run.folder}, {limit_of(self.training)}")
        self.say(
            f"  parameters: {sizes}; a step reads {data.lanes} passages of {data.window_bytes} bytes; {processes} on "
            f"{accelerator.device.type}, {threads_of}{precision}"
        )

    def main_says(self, fact: bool) -> bool:
        """Whether the fact holds on rank 0; every rank gets the same answer."""
        own = torch.tensor(int(fact and self.accelerator.is_main_process), device=self.accelerator.device)
        return bool(self.accelerator.reduce(own))

    def segmenter(self, corpus: Corpus) -> Segmenter | None:
        """The run's segmenter, trained when there is none yet; None for strategies that need none."""
        chunking, path = self.config.chunking, self.run.folder.parent / "segmenter" / "model"
        if not chunking.needs_segmenter:
            return None
        marked = path.with_name("text")  # fingerprint of the text that it was trained on
        found = marked.read_text(encoding="ascii") if path.is_dir() and marked.is_file() else ""
        if found not in ("", corpus.fingerprint):
            raise ConfigError(
                f"{path.parent} was trained on a text of fingerprint {found[:SHOWN]}, {corpus.name} has "
                f"{corpus.fingerprint[:SHOWN]}: restore that text, or choose another --name"
            )

        def make() -> None:
            made = train_segmenter(
                chunking,
                corpus,
                seed=self.config.seed,
                most_minutes=SEGMENTER_SHARE * self.training.minutes or math.inf,
                clock=self.training.clock,
                say=self.say,
                at_step=self.beat,
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(marked, corpus.fingerprint)
            export(made, path)

        self.on_main(make, unless=path.is_dir())
        return read_segmenter(path, chunking)

    def windows(self, corpus: Corpus, segmenter: Segmenter | None) -> Windows | StreamedWindows:
        """A corpus laid out for training; where its chunks start is kept in the run when that took a segmenter.

        Where text is streamed, the stream that the corpus is the beginning of, which is cut as it comes.
        """
        config, starts = self.config, None
        if config.data.stream:
            return StreamedWindows(
                open_source(config.data),
                corpus,
                make_chunker(config.chunking, segmenter),
                config.data,
                seed=config.seed,
                rank=self.accelerator.process_index,
                ranks=self.accelerator.num_processes,
                agree=agreement(self.accelerator),
            )
        if segmenter is not None:
            folder = self.run.folder.parent / "segmenter"
            self.on_main(lambda: cached_starts(folder, segmenter, corpus, self.beat))
            starts = cached_starts(folder, segmenter, corpus)
        return Windows(
            corpus,
            make_chunker(config.chunking, segmenter),
            lanes=config.data.lanes,
            window_bytes=config.data.window_bytes,
            seed=config.seed,
            chunk_start=starts,
            question_weight=config.data.question_weight,
        )

    def beat(self) -> None:
        """Notify the others that the main process is at work: they would take a long silence for a hang."""
        self.main_says(True)

    def on_main(self, work: Callable[[], object], unless: bool = False) -> None:
        """Run `work`, which calls `beat`, on the main process while the others wait."""
        if not self.main_says(not unless):
            return
        if self.accelerator.is_main_process:
            work()
            self.main_says(False)
        else:
            while self.main_says(True):
                pass

    def export(self, model: Any, path: Path) -> None:
        """Save a model from the main process."""
        if self.accelerator.is_main_process:
            export(model, path)

    def finish(self, totals: Totals, corpus: Corpus) -> None:
        """Mark the stage as done: totals.json comes last."""
        if self.accelerator.is_main_process:
            write_totals(self.run.folder, replace(totals, corpus=corpus.fingerprint))
            seen = f"{totals.steps:,} step{'s' * (totals.steps != 1)}, {totals.characters:,.0f} characters"
            self.say(f"saved {self.run.folder.parent}: {seen} in {in_minutes(totals.seconds / 60)}")


def make_accelerator(config: TrainingConfig, logging: LoggingConfig, folder: str) -> Accelerator:
    """One process or many, CPU or not, from the environment that `accelerate launch` set.

    Raises ConfigError where that environment asks for another training than the config.
    """
    check_launch()
    check_training(config)
    check_trackers(logging)
    AcceleratorState._reset_state()  # of a stage before this one; the processes stay
    with naming_variables():
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # other accelerators lack float64 or operators used here
            mixed_precision=config.mixed_precision,
            log_with=list(logging.trackers) or None,
            project_dir=folder,
            # Buffers hold sums of each rank's own rows; the objectives add them up in end_step.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(seconds=TIMEOUT_S)),
            ],
        )
    return accelerator


def limit_of(training: StageConfig) -> str:
    """How long a stage trains, in words."""
    return in_minutes(training.minutes) if training.minutes else f"{training.steps:,} steps"


def stages_of(config: Config) -> tuple[str, ...]:
    """What is trained of a config, in order: both stages, or the twin's one."""
    return ("autoencoder",) if config.is_twin else ("autoencoder", "prior")


def plan(*configs: Config) -> list[Part]:
    """The trainings of runs one after another: the number of each, and the minutes of those after it."""
    minutes = [getattr(config.training, stage).minutes for config in configs for stage in stages_of(config)]
    return [
        Part(place, len(minutes), sum(minutes[place:]) if all(minutes[place:]) else None)
        for place in range(1, len(minutes) + 1)
    ]


@contextmanager
def open_stage(
    config: RunSettings, name: str, resume: bool, root: Path, part: Part | None = None
) -> Iterator[Stage]:
    """Open runs/<config.name>/<name> for one stage, and seed it.

    part: of what this process trains, so that the processes stay together for what follows; None: nothing follows
    """
    check_run_name(config.name)
    training: TrainingConfig = config.training.of(name)
    folder = root / config.name / name
    accelerator = make_accelerator(training, config.logging, str(folder))
    is_main = accelerator.is_main_process
    say: Callable[[str], None] = say_line if is_main else (lambda line: None)
    run = open_run(
        folder, config=to_dict(config), resume=resume, is_main=is_main, may_change=MAY_CHANGE, say=say
    )
    if found := list(rounding_variables()):
        say(f"{', '.join(found)}: set in the environment, so sums may round otherwise than without")
    if accelerator.device.type == "cpu" and (reason := why_plain()):
        say(f"C++ kernels: {reason}; sums round otherwise than with them")
    roll_call = make_roll_call()
    own = plan(config)[stages_of(config).index(name)] if isinstance(config, Config) else ALONE
    place, opened = part or own, clock_named(training.clock)()
    try:
        torch.manual_seed(config.seed)
        yield Stage(config, training, run, accelerator, say, resume, opened, place)
        accelerator.wait_for_everyone()
        for tracker in accelerator.trackers:
            tracker.finish()
        if part is None or part.number == part.of:
            accelerator.state.destroy_process_group()
    except Stopped as stopped:  # outside the training loop; what that has saved stands
        if saved := list(checkpoints_in(folder).values()):
            raise Interrupted(stopped.signum, str(saved[-1])) from None
        raise
    except RuntimeError as error:
        if roll_call is None or not is_rank_failure(error):
            raise
        steps = list(checkpoints_in(folder).values())
        raise RankLost(
            f"{missing_ranks(roll_call)} of {accelerator.num_processes} has died or hangs "
            f"(no answer for {TIMEOUT_S:g} seconds): "
            f"{f'go on from {steps[-1]} with --resume' if steps else 'nothing is saved yet'} ({error})"
        ) from error
    finally:
        run.discard_if_unused()  # it failed before its first line: a mistake does not use up the name
        run.close()


def export(model: Any, path: Path) -> None:
    """save_pretrained into a fresh folder, put in place of the old one when complete."""
    fresh, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with naming(path):
        try:
            model.save_pretrained(str(fresh))
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _plain_settings(config: RunSettings) -> dict[str, int | float | str]:
    """Settings by dotted key, as numbers or text: all that TensorBoard's hparams take."""
    settings = dotted(to_dict(config))
    return {
        key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()
    }
