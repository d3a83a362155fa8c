"""The two stages as tables of contents: read the config, build the parts, fit, save.

runs/<name>/segmenter/    what some chunking strategies ask, made before stage one: model/, boundaries
runs/<name>/autoencoder/  stage one: checkpoints/, model/, rate/ (the mixture)
runs/<name>/prior/        stage two: checkpoints/, model/
runs/<name>/pipeline/     both, as a diffusers pipeline
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hldm.chunking.chunker import Chunker, make_chunker
from hldm.chunking.segmenter import Segmenter
from hldm.config import Config, ConfigError, TrainingConfig, to_dict
from hldm.generation.chunk import write_chunks
from hldm.generation.pipeline import HLDMPipeline
from hldm.generation.writer import Continuation, row_generators, write_on
from hldm.model.autoencoder import Autoencoder
from hldm.model.mixture import MixturePredictor
from hldm.model.prior import Prior
from hldm.runs.checkpoints import atomic_write, checkpoints_in, fingerprint, naming
from hldm.runs.clock import clock_named
from hldm.runs.folder import Run, check_run_name, check_settings, open_run
from hldm.runs.progress import say_line
from hldm.runs.ranks import RankLost, is_rank_failure, make_roll_call, missing_ranks
from hldm.runs.signals import Interrupted, Stopped
from hldm.text.bytes import to_ids
from hldm.text.corpus import Corpus, load_corpora
from hldm.text.windows import Batch, Windows, cache_latents, load_latents
from hldm.training.objectives import AutoencoderObjective, CachedLatents, PriorObjective, read_latents
from hldm.training.segmenters import attach_segmenter, cached_starts, read_segmenter, train_segmenter
from hldm.training.sizes import require_room
from hldm.training.trainer import Totals, Trainer, make_accelerator

MAY_CHANGE_ONCE_TRAINED = ("name", "checkpoint.", "logging.", "generation.")
MAY_CHANGE = (*MAY_CHANGE_ONCE_TRAINED, "training.")  # on resume
SEGMENTER_SHARE = 0.2  # of stage one's minutes, at most, for what cuts its text
SAMPLE_BYTES = 160  # of validation text: what samples reconstruct or go on from


@dataclass(frozen=True)
class Stage:
    """What both stages need: settings, the open run folder, the processes."""

    config: Config
    training: TrainingConfig
    run: Run
    accelerator: Accelerator
    say: Callable[[str], None]  # prints on the main process
    resume: bool
    opened: float  # what the clock of its training showed at the start

    def fit(
        self,
        objective: AutoencoderObjective | PriorObjective,
        windows: Windows,
        parts: dict[str, nn.Module],
        on_sample: Callable[[nn.Module], str],
        bound_to: dict[str, str] | None = None,
    ) -> Totals:
        """Train an objective from its start or newest checkpoint; `bound_to` must not change in between.

        The minutes count from the opening of the stage: what it prepares, such as a cache, is paid for.
        """
        config = self.config
        trainer = Trainer(
            objective,
            windows,
            self.training,
            run=self.run,
            seed=config.seed,
            checkpoint=config.checkpoint,
            logging=config.logging,
            accelerator=self.accelerator,
            extras={"corpus": windows.corpus.fingerprint, **(bound_to or {})},
            spent=clock_named(self.training.clock)() - self.opened,
        )
        if self.resume:
            trainer.restore(self.say)
            self.run.rewind(trainer.totals.steps or -1)
            self.say(f"resuming {self.run.folder} at step {trainer.totals.steps}")
        sizes = ", ".join(
            f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items()
        )
        minutes, steps = self.training.minutes, self.training.steps
        self.say(
            f"{self.run.folder}: {f'{minutes:g} minutes' if minutes else f'{steps} steps'}, "
            f"{config.data.lanes} lanes x {config.data.window_bytes} bytes a step | {sizes} parameters | "
            f"{self.accelerator.num_processes} process(es) {self.accelerator.distributed_type.value}, "
            f"{self.accelerator.device}, {self.training.mixed_precision}, {torch.get_num_threads()} threads"
        )
        if config.logging.trackers:
            self.accelerator.init_trackers(config.name, config=_flat(to_dict(config)))
        totals = trainer.fit(self.say, on_sample)
        objective.eval()
        return totals

    def main_says(self, fact: bool) -> bool:
        """Rank 0's opinion, on every rank."""
        own = torch.tensor(int(fact and self.accelerator.is_main_process), device=self.accelerator.device)
        return bool(self.accelerator.reduce(own))

    def segmenter(self, corpus: Corpus) -> Segmenter | None:
        """The run's segmenter, trained when there is none yet; None for strategies that need none."""
        chunking, path = self.config.chunking, self.run.folder.parent / "segmenter" / "model"
        if not chunking.needs_segmenter:
            return None

        def make() -> None:
            made = train_segmenter(
                chunking,
                corpus,
                seed=self.config.seed,
                minutes=SEGMENTER_SHARE * self.training.minutes or math.inf,
                clock=self.training.clock,
                say=self.say,
                at_step=self.beat,
            )
            _export(made, path)

        self.on_main(make, unless=path.is_dir())
        return read_segmenter(path, chunking)

    def windows(self, corpus: Corpus, segmenter: Segmenter | None, shuffle: bool = True) -> Windows:
        """A corpus laid out for training; where its chunks start is kept in the run when that took a segmenter."""
        config, starts = self.config, None
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
            shuffle=shuffle,
            chunk_start=starts,
        )

    def beat(self) -> None:
        """Tell the others that the main process is at work: they would take a long silence for a hang."""
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
            _export(model, path)

    def finish(self, totals: Totals) -> None:
        """Mark the stage as done: totals.json comes last."""
        if self.accelerator.is_main_process:
            atomic_write(self.run.folder / "totals.json", json.dumps(vars(totals)) + "\n")
            self.say(f"saved {self.run.folder.parent}")


@contextmanager
def open_stage(config: Config, name: str, resume: bool, root: Path) -> Iterator[Stage]:
    """Open runs/<config.name>/<name> for one stage, and seed it."""
    check_run_name(config.name)
    training: TrainingConfig = getattr(config.training, name)
    folder = root / config.name / name
    accelerator = make_accelerator(training, config.logging, str(folder))
    is_main = accelerator.is_main_process
    say: Callable[[str], None] = say_line if is_main else (lambda line: None)
    run = open_run(
        folder, config=to_dict(config), resume=resume, is_main=is_main, may_change=MAY_CHANGE, say=say
    )
    roll_call = make_roll_call()
    try:
        torch.manual_seed(config.seed)
        yield Stage(config, training, run, accelerator, say, resume, clock_named(training.clock)())
        accelerator.wait_for_everyone()
        accelerator.end_training()
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
            f"(training.{name}.timeout_s is {training.timeout_s:g}): "
            f"{f'go on from {steps[-1]} with --resume' if steps else 'nothing is saved yet'} ({error})"
        ) from error
    finally:
        run.discard_if_unused()  # it failed before its first line: a mistake does not use up the name
        run.close()


def train_autoencoder(config: Config, *, resume: bool = False, root: Path = Path("runs")) -> Path:
    """Stage one, or the twin. Returns the run's folder."""
    folder = root / config.name
    require_room(config, "autoencoder", root)
    corpora = load_corpora(config.data)  # before the folder is opened: a mistake leaves none
    with open_stage(config, "autoencoder", resume, root) as stage:
        segmenter = stage.segmenter(corpora["train"])
        windows = stage.windows(corpora["train"], segmenter)
        chunker = make_chunker(config.chunking, segmenter)
        sample_text = opening(chunker, corpora["validation"])
        autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking, config.diffusion.gamma_0)
        if segmenter is not None:
            attach_segmenter(autoencoder, segmenter)
        if stage.training.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        parts: dict[str, nn.Module] = {"autoencoder": autoencoder}
        objective = AutoencoderObjective(autoencoder, config.autoencoder, config.diffusion.gamma_0)

        def on_sample(model: nn.Module) -> str:
            assert isinstance(model, AutoencoderObjective)
            if config.is_twin:
                return _continue(model.autoencoder, None, sample_text, config)
            return _reconstruct(model.autoencoder, sample_text, config)

        bound_to = {} if segmenter is None else {"segmenter": autoencoder.config["segmenter"]}
        totals = stage.fit(objective, windows, parts, on_sample, bound_to)
        stage.export(autoencoder, stage.run.folder / "model")
        if objective.mixture is not None:
            stage.export(objective.mixture, stage.run.folder / "rate")
        if config.is_twin:
            pipeline = HLDMPipeline.assemble(autoencoder, None, config.generation)
            stage.export(pipeline.with_segmenter(segmenter), folder / "pipeline")
        stage.finish(totals)
    return folder


def train_diffusion(config: Config, *, resume: bool = False, root: Path = Path("runs")) -> Path:
    """Stage two, on the autoencoder of the same run. Returns the run's folder."""
    if config.is_twin:
        raise ConfigError("autoencoder.latent_dim is 0: the twin has no latents and so no second stage")
    folder = root / config.name
    require_room(config, "prior", root)
    autoencoder = read_autoencoder(folder, config)
    binding = fingerprint(autoencoder.state_dict())
    segmenter = read_segmenter(folder / "segmenter" / "model", config.chunking)
    if segmenter is not None:
        attach_segmenter(autoencoder, segmenter)
    corpora = load_corpora(config.data)
    sample_text = opening(autoencoder.chunker, corpora["validation"])
    with open_stage(config, "prior", resume, root) as stage:
        windows = stage.windows(corpora["train"], segmenter)
        prior = _first_prior(folder, config)
        latents = None
        if config.data.cache_latents:
            whole = stage.windows(corpora["train"], segmenter, shuffle=False)
            latents = _cached_latents(folder, whole, autoencoder.eval(), binding, stage)
        objective = PriorObjective(prior, autoencoder, stage.training.joint, latents)

        def on_sample(model: nn.Module) -> str:
            assert isinstance(model, PriorObjective)
            return _continue(model.autoencoder, model.prior, sample_text, config)

        totals = stage.fit(objective, windows, {"prior": prior}, on_sample, {"autoencoder": binding})
        # A joint phase has changed the autoencoder: what is exported belongs together.
        prior.register_to_config(autoencoder=fingerprint(autoencoder.state_dict()))
        stage.export(prior, stage.run.folder / "model")
        pipeline = HLDMPipeline.assemble(autoencoder, prior, config.generation).with_segmenter(segmenter)
        stage.export(pipeline, folder / "pipeline")
        stage.finish(totals)
    return folder


def train_run(config: Config, *, root: Path = Path("runs")) -> Path:
    """Both stages of a run, or the twin's one: each trained, gone on with, or said to be there already.

    Raises ValueError where what is there was trained with other settings.
    """
    for stage, train in (("autoencoder", train_autoencoder), ("prior", train_diffusion)):
        folder = root / config.name / stage
        if stage == "prior" and config.is_twin:
            continue
        if (folder / "totals.json").is_file():
            check_settings(folder, to_dict(config), MAY_CHANGE_ONCE_TRAINED)
            minutes = read_totals(folder).seconds / 60
            print(
                f"reusing {folder}, trained in {minutes:.1f} minutes (remove it to train again)", flush=True
            )
        else:
            train(config, resume=folder.is_dir(), root=root)  # whatever it was stopped at
    return root / config.name


def read_autoencoder(folder: Path, config: Config) -> Autoencoder:
    """The trained stage one of a run. Raises with the command that makes it, or what disagrees."""
    path = folder / "autoencoder" / "model"
    if not path.is_dir():
        raise FileNotFoundError(
            f"{folder} has no trained autoencoder: run train_autoencoder.py with the same --config and --name first"
        )
    autoencoder = Autoencoder.from_pretrained(path)
    for section, trained in (("autoencoder", autoencoder.settings), ("chunking", autoencoder.chunking)):
        found = _flat(asdict(trained), f"{section}.")
        for key, value in _flat(asdict(getattr(config, section)), f"{section}.").items():
            if found[key] != value:
                raise ConfigError(
                    f"{key} is {value} here, but {path} was trained with {found[key]}: "
                    "use the config it was trained with, or another --name"
                )
    trained_at = autoencoder.config["gamma_0"]
    if trained_at != config.diffusion.gamma_0:
        raise ConfigError(
            f"diffusion.gamma_0 is {config.diffusion.gamma_0} here, but the decoder of {path} was trained at "
            f"{trained_at}: use the config it was trained with, or another --name"
        )
    return autoencoder


def read_totals(folder: Path) -> Totals:
    """What a stage cost, from its totals.json."""
    return Totals(**json.loads((folder / "totals.json").read_text(encoding="utf-8")))


def opening(chunker: Chunker, corpus: Corpus) -> bytes:
    """The first words of a corpus, cut at a chunk border: what samples start from."""
    text = corpus.text[: 4 * SAMPLE_BYTES].tobytes()
    starts = chunker.chunk_start(text).nonzero()[0]
    return text[: int(starts[starts <= SAMPLE_BYTES].max()) or SAMPLE_BYTES]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values: all that TensorBoard's hparams take."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return flat


def _first_prior(folder: Path, config: Config) -> Prior:
    """Stage two starts from stage one's mixture."""
    prior = Prior.from_settings(config.autoencoder, config.prior, config.hierarchy, config.diffusion)
    if prior.mixture is not None:
        mixture = MixturePredictor.from_pretrained(folder / "autoencoder" / "rate")
        prior.mixture.load_state_dict(mixture.state_dict())
    return prior


def _cached_latents(
    folder: Path, windows: Windows, autoencoder: Autoencoder, binding: str, stage: Stage
) -> CachedLatents:
    """mu of every chunk of the training text, from runs/<name>/latents.safetensors, made when missing."""
    path = folder / "latents.safetensors"
    with_features = stage.config.prior.reads_text or stage.config.autoencoder.components > 0
    bound: dict[str, object] = {
        "autoencoder": binding,
        "corpus": windows.corpus.fingerprint,
        "chunking": to_dict(stage.config)["chunking"],
        "features": with_features,
    }
    if autoencoder.config["segmenter"]:
        bound["segmenter"] = autoencoder.config["segmenter"]
    if stage.main_says(not path.exists()) and not stage.accelerator.is_main_process:
        for _ in range(windows.windows_per_epoch):
            stage.main_says(True)
    elif not path.exists():
        stage.say(f"caching latents in {path}")
        device = stage.accelerator.device
        autoencoder.to(device)
        state = autoencoder.encoder_state(windows.lanes, device)

        @torch.no_grad()
        def encode(batch: Batch) -> Tensor:
            nonlocal state
            stage.main_says(True)  # that it is at work: the others would take a long silence for a hang
            encoding, state = read_latents(autoencoder, batch.to(device), state)
            parts = [encoding.latents, encoding.after] if with_features else [encoding.latents]
            return torch.cat(parts, dim=-1).cpu()

        cache_latents(encode, windows, path, bound)
    stage.accelerator.wait_for_everyone()
    return CachedLatents(load_latents(path, bound))


def _export(model: Any, path: Path) -> None:
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


def _continue(autoencoder: Autoencoder, prior: Prior | None, prompt: bytes, config: Config) -> str:
    """A sample: the prompt and what the model makes of it."""
    rows: list[Continuation] = []
    for rows, _, _ in write_on(  # noqa: B007 - the last yield is the finished text
        autoencoder, prior, [prompt], config.generation, max_characters=200, seed=config.seed
    ):
        pass
    return f"{prompt.decode(errors='replace')} | {rows[0].text.decode(errors='replace')}"


@torch.no_grad()
def _reconstruct(autoencoder: Autoencoder, text: bytes, config: Config) -> str:
    """A sample of stage one: validation text, read into latents and written back from them."""
    device = next(autoencoder.parameters()).device
    start = torch.from_numpy(autoencoder.chunker.chunk_start(text))[None].to(device)
    symbols = torch.from_numpy(to_ids(text))[None].to(device)
    doc_start = torch.zeros_like(start)
    doc_start[:, 0] = True
    length = torch.tensor([len(text)], device=device)
    encoding, _ = autoencoder.encode(symbols, length, doc_start, start, autoencoder.encoder_state(1, device))
    n = encoding.latents.shape[1]
    # every chunk on its own, side by side, from its noise-free latent
    alpha = torch.sigmoid(torch.tensor(-config.diffusion.gamma_0)).sqrt().to(device)
    pieces = write_chunks(
        autoencoder,
        alpha * encoding.latents[0],
        autoencoder.encoder_state(n, device),
        autoencoder.decoder_state(n, device),
        [True] * n,
        replace(config.generation, decoder_temperature=0.0),
        row_generators(config.seed, n),
    ).pieces
    written = b"".join(piece.text for piece in pieces)
    return f"{text.decode(errors='replace')}\n{written.decode(errors='replace')}"
