"""The two stages as tables of contents: read the config, build the parts, fit, save.

    runs/<name>/autoencoder/  stage one: checkpoints/, model/, rate/ (the light prior, if there is one)
    runs/<name>/prior/        stage two: checkpoints/, model/
    runs/<name>/pipeline/     both, as a diffusers pipeline
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hldm.autoencoder import Autoencoder
from hldm.checkpoints import atomic_write, fingerprint
from hldm.chunking import make_chunker
from hldm.config import Config, ConfigError, TrainingConfig, to_dict
from hldm.corpus import load_corpus
from hldm.data import Batch, Windows, cache_latents, load_latents
from hldm.generation import row_generators, write_chunks, write_on
from hldm.objectives import AutoencoderObjective, PriorObjective, read_latents
from hldm.pipeline import HLDMPipeline
from hldm.prior import Prior
from hldm.runs import open_run
from hldm.training import Totals, Trainer, make_accelerator

MAY_CHANGE = ("name", "training.", "checkpoint.", "logging.", "generation.")  # on resume
FIT_WINDOWS = 8  # windows of every lane that the normaliser is fitted on at the end: some 50,000 bytes
SAMPLE_BYTES = 160  # of validation text: what samples reconstruct or go on from


def train_autoencoder(config: Config, *, resume: bool = False, root: Path = Path("runs")) -> Path:
    """Stage one, or the twin. Returns the run's folder."""
    training = config.training.autoencoder
    folder = root / config.name
    accelerator = make_accelerator(training, config.logging, str(folder / "autoencoder"))
    say = _sayer(accelerator.is_main_process)
    run = open_run(
        folder / "autoencoder",
        config=to_dict(config),
        resume=resume,
        is_main=accelerator.is_main_process,
        may_change=MAY_CHANGE,
        say=say,
    )
    torch.manual_seed(config.seed)
    windows = _training_windows(config)
    autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking)
    if training.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    prior = None
    if config.autoencoder.rate == "diffusion" and not config.is_twin:
        prior = Prior.from_settings(
            config.autoencoder.latent_dim, config.prior, config.hierarchy, config.diffusion
        )
    objective = AutoencoderObjective(autoencoder, config.autoencoder, config.diffusion.gamma_0, prior)
    trainer = Trainer(
        objective,
        windows,
        training,
        run=run,
        seed=config.seed,
        checkpoint=config.checkpoint,
        logging=config.logging,
        accelerator=accelerator,
        extras={"stage": "autoencoder", "corpus": windows.corpus.fingerprint},
    )
    _start(trainer, config, resume, say, {"autoencoder": autoencoder, "rate prior": prior})
    sample = validation_text(config)

    def on_sample(model: nn.Module) -> str:
        assert isinstance(model, AutoencoderObjective)
        if config.is_twin:
            return _continue(model.autoencoder, None, sample, config)
        return _reconstruct(model.autoencoder, sample, config)

    totals = trainer.fit(say, on_sample)
    objective.eval()
    if autoencoder.latent_dim:
        _fit_normaliser(autoencoder, config)
    if accelerator.is_main_process:
        _export(autoencoder, run.folder / "model")
        if prior is not None:
            _export(prior, run.folder / "rate")
        _write_totals(run.folder, totals)
        if config.is_twin:
            _export(HLDMPipeline.assemble(autoencoder, None, config.generation), folder / "pipeline")
        say(f"saved {folder}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    run.close()
    return folder


def train_diffusion(config: Config, *, resume: bool = False, root: Path = Path("runs")) -> Path:
    """Stage two, on the autoencoder of the same run. Returns the run's folder."""
    if config.is_twin:
        raise ConfigError("autoencoder.latent_dim is 0: the twin has no latents and so no second stage")
    training = config.training.prior
    folder = root / config.name
    autoencoder = read_autoencoder(folder, config)
    binding = fingerprint(autoencoder.state_dict())
    accelerator = make_accelerator(training, config.logging, str(folder / "prior"))
    say = _sayer(accelerator.is_main_process)
    run = open_run(
        folder / "prior",
        config=to_dict(config),
        resume=resume,
        is_main=accelerator.is_main_process,
        may_change=MAY_CHANGE,
        say=say,
    )
    torch.manual_seed(config.seed)
    windows = _training_windows(config)
    prior = _first_prior(folder, config, say)
    latents = None
    if config.data.cache_latents:
        latents = _cached_latents(folder, config, autoencoder.eval(), windows, binding, say)
    objective = PriorObjective(prior, autoencoder, training.joint, latents)
    trainer = Trainer(
        objective,
        windows,
        training,
        run=run,
        seed=config.seed,
        checkpoint=config.checkpoint,
        logging=config.logging,
        accelerator=accelerator,
        extras={"stage": "prior", "corpus": windows.corpus.fingerprint, "autoencoder": binding},
    )
    _start(trainer, config, resume, say, {"prior": prior})
    sample = validation_text(config)

    def on_sample(model: nn.Module) -> str:
        assert isinstance(model, PriorObjective)
        return _continue(model.autoencoder, model.prior, sample, config)

    totals = trainer.fit(say, on_sample)
    objective.eval()
    if accelerator.is_main_process:
        # A joint phase has changed the autoencoder: the pair in the pipeline belongs together.
        prior.register_to_config(autoencoder=fingerprint(autoencoder.state_dict()))
        _export(prior, run.folder / "model")
        _write_totals(run.folder, totals)
        _export(HLDMPipeline.assemble(autoencoder, prior, config.generation), folder / "pipeline")
        say(f"saved {folder}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    run.close()
    return folder


def read_autoencoder(folder: Path, config: Config) -> Autoencoder:
    """The trained stage one of a run. Raises with the command that makes it, or what disagrees."""
    path = folder / "autoencoder" / "model"
    if not path.is_dir():
        raise FileNotFoundError(
            f"{folder} has no trained autoencoder: run train_autoencoder.py with the same --config and --name first"
        )
    autoencoder = Autoencoder.from_pretrained(str(path), local_files_only=True)
    for section in ("autoencoder", "chunking"):
        wanted, found = to_dict(config)[section], dict(autoencoder.config[section])
        for key, value in wanted.items():
            if json.dumps(found.get(key), default=list) != json.dumps(value):
                raise ConfigError(
                    f"{section}.{key} is {value} here, but {path} was trained with {found.get(key)}: "
                    "use the config it was trained with, or another --name"
                )
    return autoencoder


def read_totals(folder: Path) -> Totals:
    """What a stage cost, from its totals.json."""
    return Totals(**json.loads((folder / "totals.json").read_text(encoding="utf-8")))


def validation_text(config: Config) -> bytes:
    """The opening of the validation split, cut at a chunk border."""
    text = load_corpus(config.data, "validation").text[: 4 * SAMPLE_BYTES].tobytes()
    starts = make_chunker(config.chunking).chunk_start(text).nonzero()[0]
    return text[: int(starts[starts <= SAMPLE_BYTES].max()) or SAMPLE_BYTES]


def _training_windows(config: Config) -> Windows:
    return Windows(
        load_corpus(config.data, "train"),
        make_chunker(config.chunking),
        lanes=config.data.lanes,
        window_bytes=config.data.window_bytes,
        seed=config.seed,
    )


def _sayer(is_main: bool) -> Callable[[str], None]:
    return (lambda line: print(line, flush=True)) if is_main else (lambda line: None)


def _start(
    trainer: Trainer, config: Config, resume: bool, say: Callable[[str], None], parts: dict[str, Any]
) -> None:
    """Restore if asked to, and say what is about to run."""
    accelerator, data = trainer.accelerator, config.data
    if resume and trainer.restore(say):
        trainer.run.rewind(trainer.totals.steps)
        say(f"resuming {trainer.run.folder} at step {trainer.totals.steps}")
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part}
    sizes = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    length = f"{trainer.config.minutes:g} minutes" if trainer.config.minutes else f"{trainer.config.steps} steps"
    say(
        f"{trainer.run.folder}: {length}, {data.lanes} lanes x {data.window_bytes} bytes a step | {sizes} parameters | "
        f"{accelerator.num_processes} process(es) {accelerator.distributed_type.value}, {accelerator.device}, "
        f"{trainer.config.mixed_precision}, {torch.get_num_threads()} threads"
    )
    if accelerator.trackers or config.logging.trackers:
        accelerator.init_trackers(config.name, config=_flat(to_dict(config)))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values: all that TensorBoard's hparams take."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return flat


def _first_prior(folder: Path, config: Config, say: Callable[[str], None]) -> Prior:
    """Stage two starts from stage one's light prior when that has the same shape."""
    prior = Prior.from_settings(
        config.autoencoder.latent_dim, config.prior, config.hierarchy, config.diffusion
    )
    path = folder / "autoencoder" / "rate"
    if path.is_dir():
        light = Prior.from_pretrained(str(path), local_files_only=True)
        shapes = {name: tensor.shape for name, tensor in prior.state_dict().items()}
        if (light.diffusion, {k: v.shape for k, v in light.state_dict().items()}) == (prior.diffusion, shapes):
            say(f"starting from stage one's prior, {path}")
            prior.load_state_dict(light.state_dict())
    return prior


@torch.no_grad()
def _fit_normaliser(autoencoder: Autoencoder, config: Config) -> None:
    """Replace running statistics by those of the finished encoder, over the first windows of all lanes."""
    corpus = load_corpus(config.data, "train")
    windows = Windows(
        corpus,
        make_chunker(config.chunking),
        lanes=config.data.lanes,
        window_bytes=config.data.window_bytes,
        shuffle=False,
    )
    device = next(autoencoder.parameters()).device
    state = autoencoder.encoder_state(windows.lanes, device)
    normaliser = autoencoder.normaliser
    for index in range(min(FIT_WINDOWS, windows.windows_per_epoch)):
        encoding, state = read_latents(autoencoder, windows.batch(index).to(device), state)
        raw = encoding.latents[encoding.mask] * normaliser.deviation + normaliser.mean
        normaliser.observe(raw)
    normaliser.update(momentum=0)


def _cached_latents(
    folder: Path,
    config: Config,
    autoencoder: Autoencoder,
    windows: Windows,
    binding: str,
    say: Callable[[str], None],
) -> Tensor:
    """mu of every chunk of the training text, from runs/<name>/latents.safetensors, made when missing."""
    path = folder / "latents.safetensors"
    bound: dict[str, object] = {
        "autoencoder": binding,
        "corpus": windows.corpus.fingerprint,
        "chunking": to_dict(config)["chunking"],
    }
    if not path.exists():
        say(f"caching latents in {path}")
        plain = Windows(
            windows.corpus,
            make_chunker(config.chunking),
            lanes=config.data.lanes,
            window_bytes=config.data.window_bytes,
            shuffle=False,
        )
        state = autoencoder.encoder_state(plain.lanes)

        @torch.no_grad()
        def encode(batch: Batch) -> Tensor:
            nonlocal state
            encoding, state = read_latents(autoencoder, batch, state)
            return encoding.latents

        cache_latents(encode, plain, path, bound)
    return torch.from_numpy(load_latents(path, bound))


def _export(model: Any, path: Path) -> None:
    """save_pretrained into a fresh folder, put in place of the old one when complete."""
    fresh, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(str(fresh))
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _write_totals(folder: Path, totals: Totals) -> None:
    atomic_write(folder / "totals.json", json.dumps(vars(totals)) + "\n")


def _continue(autoencoder: Autoencoder, prior: Prior | None, prompt: bytes, config: Config) -> str:
    """A sample: the prompt and what the model makes of it."""
    rows = []
    for rows, _, _ in write_on(  # noqa: B007 - the last yield is the finished text
        autoencoder, prior, [prompt], config.generation, max_characters=200, seed=config.seed
    ):
        pass
    return f"{prompt.decode(errors='replace')} | {rows[0].text.decode(errors='replace')}"


@torch.no_grad()
def _reconstruct(autoencoder: Autoencoder, text: bytes, config: Config) -> str:
    """A sample of stage one: validation text, read into latents and written back from them."""
    device = next(autoencoder.parameters()).device
    start = torch.from_numpy(make_chunker(config.chunking).chunk_start(text))[None].to(device)
    symbols = torch.tensor(list(text), device=device)[None]
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
        autoencoder.decoder_state(n, device),
        [True] * n,
        replace(config.generation, decoder_temperature=0.0),
        row_generators(config.seed, n),
    )
    written = b"".join(piece.text for piece in pieces)
    return f"{text.decode(errors='replace')}\n{written.decode(errors='replace')}"


def stage_training(config: Config, stage: str, **changes: Any) -> Config:
    """The config with some fields of one stage's training replaced, e.g. by --steps and --minutes."""
    current: TrainingConfig = getattr(config.training, stage)
    training = replace(config.training, **{stage: replace(current, **changes)})
    return replace(config, training=training)
