"""The two stages of training, as tables of contents: read the config, build the parts, fit, save.

runs/<name>/segmenter/    what some chunking strategies ask, made before stage one: model/, boundaries
runs/<name>/autoencoder/  stage one: checkpoints/, model/, rate/ (the mixture)
runs/<name>/prior/        stage two: checkpoints/, model/
runs/<name>/pipeline/     both, as a diffusers pipeline
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hldm.chunking.chunker import Chunker, make_chunker
from hldm.chunking.strategies import attach_segmenter, chunker_of, read_segmenter
from hldm.config import Config, ConfigError, to_dict
from hldm.generation.own_prior import code_of, prior_class
from hldm.generation.pipeline import HLDMPipeline
from hldm.generation.writer import write_on
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import alpha_sigma
from hldm.model.likelihood import read_chunks
from hldm.model.mixture import MixturePredictor
from hldm.model.prior import Prior
from hldm.plugins import allow_named
from hldm.runs.files import fingerprint
from hldm.runs.folder import check_settings, code_fingerprint, read_totals, require_same_text
from hldm.runs.identity import MAY_CHANGE_ONCE_TRAINED, SHOWN, TEXT_SETTINGS, trained_by
from hldm.sources.corpora import load_corpora
from hldm.text.bytes import END_OF_CHUNK
from hldm.text.corpus import Corpus
from hldm.text.windows import window_of
from hldm.training.objectives import AutoencoderObjective, PriorObjective
from hldm.training.sizes import require_room
from hldm.training.stage import open_stage

# What both stages must agree on: the model and, of the data section, which text is read and how it is split.
SHARED_SETTINGS = ("autoencoder.", "chunking.", "diffusion.gamma_0", *TEXT_SETTINGS)
SAMPLE_BYTES = 160  # of validation text: what samples reconstruct or go on from


def train_autoencoder(config: Config, *, resume: bool = False, root: Path = Path("runs")) -> Path:
    """Stage one, or the twin. Returns the run's folder."""
    folder = root / config.name
    allow_named(config)  # whoever trains a config has asked for the code it names
    require_room(config, "autoencoder", root)
    corpora = load_corpora(config.data)  # before the folder is opened: a mistake leaves none
    with open_stage(config, "autoencoder", resume, root) as stage:
        segmenter = stage.segmenter(corpora["train"])
        windows = stage.windows(corpora["train"], segmenter)
        chunker = make_chunker(config.chunking, segmenter)
        sample_text = opening(chunker, corpora["validation"])
        autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking, config.diffusion.gamma_0)
        attach_segmenter(autoencoder, segmenter)
        if stage.training.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        objective = AutoencoderObjective(autoencoder, config.autoencoder, config.diffusion.gamma_0)
        on_sample = partial(_sample, text=sample_text, config=config)
        mark = autoencoder.config["segmenter"]
        bound_to = {"segmenter": mark} if mark else {}
        totals = stage.fit(objective, windows, on_sample, bound_to)
        stage.export(autoencoder, stage.run.folder / "model")
        if objective.mixture is not None:
            stage.export(objective.mixture, stage.run.folder / "rate")
        if config.is_twin:
            pipeline = HLDMPipeline.assemble(autoencoder, None, config.generation)
            stage.export(pipeline.with_segmenter(segmenter), folder / "pipeline")
        stage.finish(totals, corpora["train"])
    return folder


def train_diffusion(config: Config, *, resume: bool = False, root: Path = Path("runs")) -> Path:
    """Stage two, on the autoencoder of the same run. Returns the run's folder."""
    if config.is_twin:
        raise ConfigError("autoencoder.latent_dim is 0: the twin has no latents and so no second stage")
    folder = root / config.name
    allow_named(config)
    require_room(config, "prior", root)
    autoencoder = read_autoencoder(folder, config)
    binding = fingerprint(autoencoder.state_dict())
    segmenter = read_segmenter(folder / "segmenter" / "model", config.chunking)
    attach_segmenter(autoencoder, segmenter)
    corpora = load_corpora(config.data)
    require_same_text(folder / "autoencoder", corpora["train"])
    sample_text = opening(chunker_of(autoencoder), corpora["validation"])
    with open_stage(config, "prior", resume, root) as stage:
        windows = stage.windows(corpora["train"], segmenter)
        prior = _first_prior(folder, config)
        objective = PriorObjective(prior, autoencoder)
        on_sample = partial(_sample, text=sample_text, config=config)
        totals = stage.fit(objective, windows, on_sample, {"autoencoder": binding})
        prior.register_to_config(autoencoder=binding, code=code_of(config.prior))
        stage.export(prior, stage.run.folder / "model")
        pipeline = HLDMPipeline.assemble(autoencoder, prior, config.generation).with_segmenter(segmenter)
        stage.export(pipeline, folder / "pipeline")
        stage.finish(replace(totals, autoencoder=binding), corpora["train"])
    return folder


def train_run(config: Config, *, root: Path = Path("runs")) -> Path:
    """Both stages of a run, or the twin's one: each trained, gone on with, or said to be there already.

    Raises ValueError where what is there was trained with other settings.
    """
    allow_named(config)
    for stage, train in (("autoencoder", train_autoencoder), ("prior", train_diffusion)):
        folder = root / config.name / stage
        if stage == "prior" and config.is_twin:
            continue
        if (folder / "totals.json").is_file():
            check_settings(folder, to_dict(config), MAY_CHANGE_ONCE_TRAINED)
            _check_reuse(folder, config)
        else:
            train(config, resume=folder.is_dir(), root=root)  # whatever it was stopped at
    return root / config.name


def _check_reuse(folder: Path, config: Config) -> None:
    """Say that a finished stage is reused; raise ConfigError where its text or its stage one is another by now."""
    totals, minutes = read_totals(folder), read_totals(folder).seconds / 60
    print(f"reusing {folder}, trained in {minutes:.1f} minutes (remove it to train again)", flush=True)
    if totals.corpus:
        require_same_text(folder, load_corpora(config.data)["train"])
    if totals.autoencoder:
        first = folder.parent / "autoencoder" / "model"
        now = fingerprint(Autoencoder.from_pretrained(first).state_dict())
        if now != totals.autoencoder:
            raise ConfigError(
                f"{folder} was trained on a stage one of fingerprint {totals.autoencoder[:SHOWN]}, {first} has "
                f"{now[:SHOWN]}: remove {folder} to train it again"
            )
    code = trained_by(folder.parent)
    if code and code != code_fingerprint():
        named = " and ".join(part[:SHOWN] for part in code.split(" and "))
        print(f"{folder} was trained by code {named}, this is {code_fingerprint()[:SHOWN]}", flush=True)


def read_autoencoder(folder: Path, config: Config) -> Autoencoder:
    """The trained stage one of a run. Raises with the command that makes it, or what disagrees."""
    stage = folder / "autoencoder"
    if not (stage / "model").is_dir() or not (stage / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{folder} has no trained autoencoder: run train_autoencoder.py with the same --config and --name first"
        )
    check_settings(stage, to_dict(config), only=SHARED_SETTINGS)
    return Autoencoder.from_pretrained(stage / "model")


def opening(chunker: Chunker, corpus: Corpus) -> bytes:
    """The first words of a corpus, cut at a chunk border: what samples start from."""
    text = corpus.text[: 4 * SAMPLE_BYTES].tobytes()
    starts = chunker.chunk_start(text).nonzero()[0]
    return text[: int(starts[starts <= SAMPLE_BYTES].max()) or SAMPLE_BYTES]


def _first_prior(folder: Path, config: Config) -> Prior:
    """Stage two starts from stage one's mixture."""
    sections = (config.autoencoder, config.prior, config.hierarchy, config.diffusion)
    cls = prior_class(config.prior)
    if not config.autoencoder.components:
        return cls.from_settings(*sections)
    mixture = MixturePredictor.from_pretrained(folder / "autoencoder" / "rate")
    prior = cls.from_settings(*sections, logit_cap=mixture.logit_cap)  # one trained before had none
    assert prior.mixture is not None
    prior.mixture.load_state_dict(mixture.state_dict())
    return prior


@torch.no_grad()
def _sample(objective: Any, text: bytes, config: Config) -> str:
    """What a stage in training makes of validation text.

    Stage one says what its decoder finds likeliest, from latents without noise; the others write on.
    """
    autoencoder, prior = objective.autoencoder, getattr(objective, "prior", None)
    shown = text.decode(errors="replace")
    if prior is not None or config.is_twin:
        parts = autoencoder, prior, [text], config.generation
        *_, (rows, _, _) = write_on(*parts, max_characters=200, seed=config.seed)
        return f"{shown} | {rows[0].text.decode(errors='replace')}"
    device = next(autoencoder.parameters()).device
    window = window_of([text], [chunker_of(autoencoder).chunk_start(text)], [True], device)
    encoding, _ = autoencoder.encode(window, autoencoder.encoder_state(1, device))
    alpha, _ = alpha_sigma(torch.tensor(config.diffusion.gamma_0, device=device))
    decoder = autoencoder.decoder_state(1, device)
    reading, _ = read_chunks(autoencoder, window, alpha * encoding.latents, decoder, encoding)
    symbols = reading.logits.argmax(dim=-1)[reading.events.mask].tolist()
    written = bytes(symbol for symbol in symbols if symbol < END_OF_CHUNK)
    return f"{shown}\n{written.decode(errors='replace')}"
