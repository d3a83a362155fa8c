"""What a trained run is worth: bits per character, reconstruction, continuations, speed and cost.

    python -m hldm.evaluation --run runs/demo --json demo.json

Everything is measured on held-out text with the run's own pipeline, and has the same keys for a latent model
and for its twin, so that `hldm.evaluation.tables.compare` can set them side by side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hldm.chunking.reading import held_out_windows, prompt_chunker, read_windows
from hldm.config import DataConfig, config_of_run
from hldm.evaluation.bound import evaluate_bound
from hldm.evaluation.context_length import by_distance, compare_contexts, cut_documents
from hldm.evaluation.continuations import continue_prompts
from hldm.evaluation.metrics import compute
from hldm.evaluation.parts_table import short_parts
from hldm.evaluation.prompts import choose_prompts
from hldm.evaluation.reconstruction import ENOUGH_CHUNKS, reconstruct
from hldm.evaluation.words import count_words
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.model.vitals import complaints, signs_of_latents, signs_of_schedule, signs_of_weights
from hldm.runs.doing import doing
from hldm.runs.export import public_name, source_of, stages_of
from hldm.runs.files import fingerprint
from hldm.runs.folder import corpora_of_run, read_totals, training_text_of
from hldm.runs.location import pipeline_of
from hldm.sources.corpora import copies_of_training, corpus_of_file
from hldm.sources.encodings import is_blank
from hldm.text.corpus import Corpus, Split
from hldm.text.noise import PlacedGenerator
from hldm.text.windows import Windows


def evaluate_run(
    folder: Path,
    *,
    split: Split = "test",
    text: Path | None = None,
    draws: int = 8,
    samples: int = 0,
    contexts: Sequence[int] = (),
    prompts: int = 24,
    max_characters: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a run folder's pipeline on a split of its data, or on the file `text`, and what it cost to train.

    None stands where there is nothing to measure: the twin has no latents, some texts have no prompts. What each part
    is worth is measured on a split alone: on another text `hldm.evaluation.parts_table.parts_of_run` does it.
    draws, samples: see `hldm.evaluation.bound.evaluate_bound`
    contexts: bytes that documents are cut every so many of, see `hldm.evaluation.context_length`
    Raises ValueError or OSError, one line.
    """
    limits = (("samples", samples, 0), ("prompts", prompts, 0), ("max_characters", max_characters, 1))
    for name, value, least in (*limits, ("seed", seed, 0), *(("context", length, 2) for length in contexts)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    given = None if text is None else corpus_of_file(text)
    pipeline = read_pipeline(pipeline_of(folder))
    if torch.cuda.is_available():
        pipeline.to("cuda")
    autoencoder, prior = pipeline.autoencoder, pipeline.prior
    training_text: bytes | None
    if given is None:
        corpora = corpora_of_run(folder)
        corpus, training_text = corpora[split], corpora["train"].text.tobytes()
        if is_blank(corpus.text.tobytes()):
            raise ValueError(f"{corpus.name} holds nothing but white space: there is nothing to measure")
    else:
        corpora, corpus, training_text = None, given, training_text_of(folder) if prompts else None
    generator = torch.Generator().manual_seed(seed)
    # one text costs what `HLDMPipeline.score` says of it, to rounding
    noise = generator if text is None else PlacedGenerator(seed)
    windows = held_out_windows(autoencoder, corpus)
    samples = 0 if prior is None else samples  # the twin's likelihood needs no bound
    name = folder.resolve().name
    with doing(f"measuring the bits per character of {name} on {windows.characters:,} characters"):
        bound = evaluate_bound(autoencoder, prior, windows, draws=draws, samples=samples, generator=noise)

    def cut(every: int) -> dict[str, Any] | None:
        pieces = held_out_windows(autoencoder, cut_documents(windows, every), windows.chunk_start)
        with doing(f"measuring the same, documents cut every {every:,} bytes"):
            short = evaluate_bound(autoencoder, prior, pieces, draws=draws, generator=generator)
        return compare_contexts(bound.by_chunk, short.by_chunk, windows, pieces, every)

    return {
        "run": name,
        "split": split if text is None else str(text),
        "measured_on": _measured_on(folder, split, corpus, windows.characters, corpora),
        "text": corpus.fingerprint,
        "model": weights_of(pipeline),
        "commit": _commit(folder),
        "seed": seed,
        "draws": draws,
        "samples": samples,
        "characters": windows.characters,
        "bits_per_character": bound.bits_per_character(),
        "perplexity": _perplexity(float(bound.nats.sum()), windows),
        **_of_latents(autoencoder, prior, windows, generator, None if text is not None else seed),
        **continue_prompts(
            pipeline,
            choose_prompts(corpus, prompt_chunker(autoencoder), prompts, max_characters=max_characters),
            training_text,
            max_characters=max_characters,
            seed=seed,
        ),
        "by_distance": by_distance(bound.by_chunk, windows),
        "context": {str(every): cut(every) for every in contexts} or None,
        "cost": cost_of(folder, pipeline),
    }


def _measured_on(
    folder: Path, split: Split, corpus: Corpus, characters: int, corpora: Mapping[Split, Corpus] | None
) -> str:
    """Which text, and how much of it, in words. corpora: the run's; None: the text is another"""
    config = (
        config_of_run(folder).data if (folder / "autoencoder" / "config.yaml").is_file() else DataConfig()
    )
    if corpora is None:
        said = f"{public_name(corpus.name)} ({characters:,} characters, as one document"
        inside = corpus.text.tobytes().count(config.separator.encode()) if config.separator else 0
        return said + (f", though the run's data.separator stands in it {inside:,} times)" if inside else ")")
    share = len(corpus.text) / sum(len(part.text) for part in corpora.values())
    said = f"the {split} split of {source_of(config)}: {characters:,} characters, {share:.1%} of the text"
    if split == "train":
        return said
    copies = copies_of_training(corpora, split)
    seen = f"{copies:,} of its {len(corpus):,} documents are in the training text, too"
    return f"{said}, {seen if copies else 'never trained on'}"


def _of_latents(
    autoencoder: Autoencoder,
    prior: Prior | None,
    windows: Windows,
    generator: torch.Generator,
    parts_seed: int | None,
) -> dict[str, Any]:
    """What is measured of latents alone; each None for the twin, which has none.

    parts_seed: of the parts table; None leaves that out
    """
    if prior is None:
        return dict.fromkeys(("characters_per_chunk", "reconstruction", "alive", "parts"))
    with doing("reconstructing chunks from their latents"):
        reconstruction = reconstruct(autoencoder, windows, prior.diffusion.gamma_0, generator)
    parts = None
    if parts_seed is not None:
        with doing("measuring what each part is worth"):
            parts = short_parts(autoencoder, prior, windows, parts_seed)
    return {
        "characters_per_chunk": windows.characters / windows.chunks,
        "reconstruction": reconstruction,
        "alive": signs_of_life(autoencoder, prior, windows),
        "parts": parts,
    }


@torch.no_grad()
def signs_of_life(autoencoder: Autoencoder, prior: Prior, windows: Windows) -> dict[str, Any]:
    """The signs of `hldm.model.vitals` on the first ENOUGH_CHUNKS chunks, and what they say is dead (`complaints`)."""
    latents: list[Tensor] = []
    weights: list[Tensor] = []
    for _, encoding in read_windows(autoencoder, windows):
        latents.append(encoding.latents[encoding.mask])
        if prior.mixture is not None:
            weights.append(prior.mixture.log_weights(encoding.before[encoding.mask]))
        if sum(map(len, latents)) >= ENOUGH_CHUNKS:
            break
    signs = signs_of_latents(torch.cat(latents)) | signs_of_schedule(prior.schedule)
    if weights:
        signs |= signs_of_weights(torch.cat(weights))
    return {**signs, "complaints": [*complaints(signs).values()]}


def _perplexity(nats: float, windows: Windows) -> dict[str, float | None]:
    """By character and by word (`hldm.evaluation.words`); None where it overflows."""
    corpus = windows.corpus
    texts = (corpus.document(index).tobytes().decode("utf-8", "replace") for index in range(len(corpus)))
    words = sum(map(count_words, texts))
    values = compute("Perplexity", nats=[nats], characters=[windows.characters], words=[words])
    found = {unit: values[f"{unit}_perplexity"] for unit in ("character", "word")}
    return {unit: value if math.isfinite(value) else None for unit, value in found.items()}


def weights_of(pipeline: HLDMPipeline) -> str:
    """A fingerprint of a pipeline's weights."""
    parts = {"autoencoder": pipeline.autoencoder, "prior": pipeline.prior}
    return fingerprint(
        {f"{name}.{k}": v for name, part in parts.items() if part for k, v in part.state_dict().items()}
    )


def cost_of(folder: Path, pipeline: HLDMPipeline) -> dict[str, float | None]:
    """Parameters, and seconds and characters of training, summed over the stages; None of a pipeline alone."""
    totals = [read_totals(stage) for stage in stages_of(folder)]
    parts = [part for part in (pipeline.autoencoder, pipeline.prior) if part is not None]
    return {
        "parameters": sum(p.numel() for part in parts for p in part.parameters()),
        "train_seconds": sum(total.seconds for total in totals) if totals else None,
        "train_characters": sum(total.characters for total in totals) if totals else None,
    }


def _commit(folder: Path) -> str | None:
    """The commit that the run's last stage last started from, if it was a clone's."""
    for stage in reversed(stages_of(folder)):
        path = stage / "environment.json"
        return json.loads(path.read_text(encoding="utf-8"))[-1].get("commit") if path.exists() else None
    return None
