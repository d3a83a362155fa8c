"""The two stages of training, as tables of contents: read the config, build the parts, fit, save.

runs/<name>/segmenter/    what some chunking strategies ask, made before stage one: model/, boundaries
runs/<name>/autoencoder/  stage one: checkpoints/, model/, rate/ (the mixture)
runs/<name>/prior/        stage two: checkpoints/, model/
runs/<name>/pipeline/     both, as a diffusers pipeline
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hldm.chunking.chunker import Chunker, make_chunker
from hldm.chunking.segmenter import Segmenter
from hldm.chunking.strategies import attach_segmenter, chunker_of, read_segmenter
from hldm.config import Config, ConfigError, PriorConfig, changed, to_dict
from hldm.generation.own_prior import code_of, prior_class
from hldm.generation.writer import write_on
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import alpha_sigma
from hldm.model.likelihood import read_chunks
from hldm.model.mixture import MixturePredictor
from hldm.model.prior import Prior
from hldm.plugins import allow_named
from hldm.runs.export import source_of
from hldm.runs.files import fingerprint
from hldm.runs.folder import check_settings, read_totals, require_same_text
from hldm.runs.identity import MAY_CHANGE_ONCE_TRAINED, SHOWN, TEXT_SETTINGS, trained_by
from hldm.runs.progress import Part
from hldm.runs.provenance import code_fingerprint
from hldm.runs.signals import is_first_rank
from hldm.sources.corpora import load_corpora
from hldm.sources.notes import is_new
from hldm.sources.splits import describe_splits
from hldm.text.bytes import END_MARK, END_OF_CHUNK
from hldm.text.corpus import Corpus, Split
from hldm.text.windows import window_of
from hldm.training.environment import check_trackers
from hldm.training.objectives import AutoencoderObjective, PriorObjective
from hldm.training.sizes import require_room
from hldm.training.stage import Stage, open_stage, plan, stages_of

# What both stages must agree on of the settings. They must read the same text, too, wherever it lies.
SHARED_SETTINGS = ("autoencoder.", "chunking.", "diffusion.gamma_0")
# What measures an autoencoder and its prior, made of an autoencoder, a text, how many bytes of it, and a seed.
Validation = Callable[
    [Autoencoder, Corpus, int, int], Callable[[Autoencoder, Prior | None], dict[str, float]]
]
WRITTEN = ">>>"  # stands in a sample between what was given and what the model wrote
VALIDATION_BYTES = (
    8192  # of held-out text, of which a validation takes the bound: the beginning of eight documents
)
SAMPLE_BYTES = 160  # of validation text: what samples reconstruct or go on from


def train_autoencoder(
    config: Config,
    *,
    resume: bool = False,
    root: Path = Path("runs"),
    part: Part | None = None,
    validation: Validation | None = None,
    begin: Callable[[Autoencoder], None] = lambda autoencoder: None,
) -> Path:
    """Stage one, or the twin. Returns the run's folder.

    validation: `hldm.evaluation.validation.validation_on`, to measure the model as it trains
    part: which of how many trainings this is, for what is shown; the run's own stages when None
    begin: called on the new autoencoder before its first step, such as to give it weights
    """
    folder = root / config.name
    allow_named(config)  # training a config is asking for the code it names
    require_room(config, "autoencoder", root)
    check_trackers(config.logging)
    corpora = load_corpora(config.data)  # before the folder is opened: a mistake leaves none
    with open_stage(config, "autoencoder", resume, root, part) as stage:
        _say_text(stage, config, corpora)
        segmenter = stage.segmenter(corpora["train"])
        windows = stage.windows(corpora["train"], segmenter)
        chunker = make_chunker(config.chunking, segmenter)
        sample_text = opening(chunker, corpora["validation"])
        autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking, config.diffusion.gamma_0)
        begin(autoencoder)
        attach_segmenter(autoencoder, segmenter)
        if stage.training.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        objective = AutoencoderObjective(autoencoder, config.autoencoder, config.diffusion.gamma_0)
        on_sample = partial(_sample, documents=sample_text, config=config)
        mark = autoencoder.config["segmenter"]
        bound_to = {"segmenter": mark} if mark else {}
        on_validate = _validate_autoencoder(config, autoencoder, corpora["validation"], validation)
        totals = stage.fit(objective, windows, on_sample, on_validate, bound_to)
        stage.export(autoencoder, stage.run.folder / "model")
        if objective.mixture is not None:
            stage.export(objective.mixture, stage.run.folder / "rate")
        if config.is_twin:
            _export_pipeline(stage, autoencoder, None, segmenter)
        stage.finish(totals, corpora["train"])
    return folder


def train_diffusion(
    config: Config,
    *,
    resume: bool = False,
    root: Path = Path("runs"),
    part: Part | None = None,
    validation: Validation | None = None,
) -> Path:
    """Stage two, on the autoencoder of the same run. Returns the run's folder.

    part, validation: see `train_autoencoder`
    """
    if config.is_twin:
        raise ConfigError("autoencoder.latent_dim is 0: the twin has no latents and so no second stage")
    folder = root / config.name
    allow_named(config)
    require_room(config, "prior", root)
    check_trackers(config.logging)
    autoencoder = read_autoencoder(folder, config)
    binding = fingerprint(autoencoder.state_dict())
    segmenter = read_segmenter(folder / "segmenter" / "model", config.chunking)
    attach_segmenter(autoencoder, segmenter)
    corpora = load_corpora(config.data)
    _require_text_of(folder / "autoencoder", config, corpora["train"])
    sample_text = opening(chunker_of(autoencoder), corpora["validation"])
    with open_stage(config, "prior", resume, root, part) as stage:
        _say_text(stage, config, corpora)
        windows = stage.windows(corpora["train"], segmenter)
        prior = _first_prior(folder, config)
        objective = PriorObjective(prior, autoencoder)
        on_sample = partial(_sample, documents=sample_text, config=config)
        on_validate = _validate_prior(config, autoencoder, corpora["validation"], validation)
        totals = stage.fit(objective, windows, on_sample, on_validate, {"autoencoder": binding})
        prior.register_to_config(autoencoder=binding, code=code_of(config.prior))
        stage.export(prior, stage.run.folder / "model")
        _export_pipeline(stage, autoencoder, prior, segmenter)
        stage.finish(replace(totals, autoencoder=binding), corpora["train"])
    return folder


def _export_pipeline(
    stage: Stage, autoencoder: Autoencoder, prior: Prior | None, segmenter: Segmenter | None
) -> None:
    """Save the models of a run as one folder that writes."""
    from hldm.generation.pipeline import HLDMPipeline  # here: two seconds of imports, before a step is taken

    assert isinstance(stage.config, Config)
    pipeline = HLDMPipeline.assemble(autoencoder, prior, stage.config.generation)
    stage.export(pipeline.with_segmenter(segmenter), stage.run.folder.parent / "pipeline")


def train_run(
    config: Config,
    *,
    root: Path = Path("runs"),
    resume: bool = True,
    parts: Sequence[Part] | None = None,
    validation: Validation | None = None,
) -> Path:
    """Both stages of a run, or the twin's one: each trained, gone on with, or said to be there already.

    resume: go on with what has begun; otherwise that is refused
    parts: of what is trained in all, those of this run's stages; when None it is all
    validation: see `train_autoencoder`
    Raises ValueError where what is there was trained with other settings.
    """
    allow_named(config)
    train = {"autoencoder": train_autoencoder, "prior": train_diffusion}
    for stage, part in zip(stages_of(config), parts or plan(config), strict=True):
        folder = root / config.name / stage
        if (folder / "totals.json").is_file():
            check_settings(folder, to_dict(config), MAY_CHANGE_ONCE_TRAINED)
            _check_reuse(folder, config)
        else:  # whatever it was stopped at
            options: dict[str, Any] = {"part": part, "validation": validation}
            train[stage](config, resume=resume and folder.is_dir(), root=root, **options)
    return root / config.name


def _check_reuse(folder: Path, config: Config) -> None:
    """Say that a finished stage is reused; raise ConfigError where its text or its stage one is another by now."""
    totals, minutes = read_totals(folder), read_totals(folder).seconds / 60
    say = print if is_first_rank() else (lambda line, flush: None)
    say(f"reusing {folder}, trained in {minutes:.1f} minutes (remove it to train again)", flush=True)
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
        say(f"{folder} was trained by code {named}, this is {code_fingerprint()[:SHOWN]}", flush=True)


def _require_text_of(stage: Path, config: Config, corpus: Corpus) -> None:
    """Raise ValueError unless this is the text of a stage; the setting that names another is said.

    A text is what it holds: a file may have moved since.
    """
    path = stage / "totals.json"
    if not path.is_file() or read_totals(stage).corpus != corpus.fingerprint:
        check_settings(stage, to_dict(config), only=TEXT_SETTINGS)
    require_same_text(stage, corpus)


def read_autoencoder(folder: Path, config: Config) -> Autoencoder:
    """The trained stage one of a run. Raises with the command that makes it, or what disagrees."""
    stage = folder / "autoencoder"
    if not (stage / "model").is_dir() or not (stage / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{folder} has no trained autoencoder: run hldm train-autoencoder with the same --config and --name first"
        )
    check_settings(stage, to_dict(config), only=SHARED_SETTINGS)
    return Autoencoder.from_pretrained(stage / "model")


def _say_text(stage: Stage, config: Config, corpora: Mapping[Split, Corpus]) -> None:
    """Say which text is read and how it is split, once for all stages."""
    line = describe_splits(source_of(config.data), config.data, corpora)
    if is_new(line):
        stage.say(line)


def opening(chunker: Chunker, corpus: Corpus) -> list[bytes]:
    """The first words of a corpus, cut at a chunk border: what samples start from, by document."""
    text = corpus.text[: 4 * SAMPLE_BYTES].tobytes()
    starts = chunker.chunk_start(text).nonzero()[0]
    end = int(starts[starts <= SAMPLE_BYTES].max()) or SAMPLE_BYTES
    borders = [0, *corpus.offsets[(corpus.offsets > 0) & (corpus.offsets < end)].tolist(), end]
    return [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]


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


def _validate_autoencoder(
    config: Config, autoencoder: Autoencoder, text: Corpus, validation: Validation | None
) -> Callable[[nn.Module], dict[str, float]] | None:
    """What measures stage one: under its mixture alone, as a prior whose network says nothing yet.

    None where latents have no cost.
    """
    if validation is None or not (config.is_twin or config.autoencoder.components):
        return None
    measure = validation(autoencoder, text, VALIDATION_BYTES, config.seed)
    if config.is_twin:

        def likelihood(objective: Any) -> dict[str, float]:
            return measure(objective.autoencoder, None)

        return likelihood
    least = changed(PriorConfig(), width=4, heads=1, layers=1, denoiser_layers=1)
    with torch.random.fork_rng():
        prior = Prior.from_settings(
            config.autoencoder, least, changed(config.hierarchy, levels=0, window=1), config.diffusion
        ).eval()

    def measured(objective: Any) -> dict[str, float]:
        prior.to(next(objective.parameters()).device)
        prior.mixture.load_state_dict(objective.mixture.state_dict())
        return measure(objective.autoencoder, prior)

    return measured


def _validate_prior(
    config: Config, autoencoder: Autoencoder, text: Corpus, validation: Validation | None
) -> Callable[[nn.Module], dict[str, float]] | None:
    """What measures stage two: both stages together."""
    if validation is None:
        return None
    measure = validation(autoencoder, text, VALIDATION_BYTES, config.seed)

    def measured(objective: Any) -> dict[str, float]:
        return measure(objective.autoencoder, objective.prior)

    return measured


@torch.no_grad()
def _sample(objective: Any, documents: list[bytes], config: Config) -> str:
    """What a stage in training makes of validation text, END_MARK where a document ends.

    Stage one says what its decoder finds likeliest, from latents without noise; the others write on.
    """
    autoencoder, prior = objective.autoencoder, getattr(objective, "prior", None)
    text = b"".join(documents)
    shown = f"{END_MARK}\n".join(document.decode(errors="replace") for document in documents)
    if prior is not None or config.is_twin:
        parts = autoencoder, prior, [text], config.generation
        *_, (rows, _, _) = write_on(*parts, max_characters=200, seed=config.seed)
        return f"{shown} {WRITTEN}{rows[0].text.decode(errors='replace')}{END_MARK * rows[0].ended}"
    device = next(autoencoder.parameters()).device
    window = window_of([text], [chunker_of(autoencoder).chunk_start(text)], [True], device)
    encoding, _ = autoencoder.encode(window, autoencoder.encoder_state(1, device))
    alpha, _ = alpha_sigma(torch.tensor(config.diffusion.gamma_0, device=device))
    decoder = autoencoder.decoder_state(1, device)
    reading, _ = read_chunks(autoencoder, window, alpha * encoding.latents, decoder, encoding)
    symbols = reading.logits.argmax(dim=-1)[reading.events.mask].tolist()
    written = bytes(symbol for symbol in symbols if symbol < END_OF_CHUNK)
    return f"{shown}\n{written.decode(errors='replace')}"
