"""What a trained run is worth: bits per character, reconstruction, continuations, speed and cost.

    python -m hldm.evaluation --run runs/demo --json demo.json

Everything is measured on held-out text with the run's own pipeline, and has the same keys for a latent model
and for its twin, so that `hldm.evaluation.tables.compare` can set them side by side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hldm.chunking.reading import held_out_windows, prompt_chunker, read_windows
from hldm.evaluation.bound import evaluate_bound
from hldm.evaluation.context_length import by_distance, compare_contexts, cut_documents
from hldm.evaluation.continuations import continue_prompts
from hldm.evaluation.metrics import compute
from hldm.evaluation.prompts import choose_prompts
from hldm.evaluation.reconstruction import ENOUGH_CHUNKS, reconstruct
from hldm.evaluation.words import count_words
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.model.vitals import complaints, signs_of_latents, signs_of_schedule, signs_of_weights
from hldm.runs.folder import corpora_of_run, read_totals
from hldm.sources.encodings import is_blank, read_text
from hldm.text.corpus import Split, make_corpus
from hldm.text.noise import PlacedGenerator
from hldm.text.windows import Windows

MAX_TEXT_BYTES = 10**9  # as data.max_bytes: more text would take days


def evaluate_run(
    folder: Path,
    *,
    split: Split = "test",
    text: Path | None = None,
    draws: int = 16,
    samples: int = 0,
    contexts: Sequence[int] = (),
    prompts: int = 24,
    max_characters: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a run folder's pipeline on a split of its data, or on the file `text`, and what it cost to train.

    None stands where there is nothing to measure: the twin has no latents, some texts have no prompts.
    draws, samples: see `hldm.evaluation.bound.evaluate_bound`
    contexts: bytes that documents are cut every so many of, see `hldm.evaluation.context_length`
    Raises ValueError or OSError, one line.
    """
    limits = (("samples", samples, 0), ("prompts", prompts, 0), ("max_characters", max_characters, 1))
    for name, value, least in (*limits, ("seed", seed, 0), *(("context", length, 2) for length in contexts)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    given = None if text is None else read_text(text, MAX_TEXT_BYTES)
    if given == b"":
        raise ValueError(f"{text} is empty: there is nothing to measure")
    pipeline = read_pipeline(folder / "pipeline")
    if torch.cuda.is_available():
        pipeline.to("cuda")
    autoencoder, prior = pipeline.autoencoder, pipeline.prior
    corpora = corpora_of_run(folder)
    corpus = corpora[split] if given is None else make_corpus(str(text), [given])
    if is_blank(corpus.text.tobytes()):
        raise ValueError(f"{corpus.name} holds nothing but white space: there is nothing to measure")
    generator = torch.Generator().manual_seed(seed)
    # one text costs what `HLDMPipeline.score` says of it, to rounding
    noise = generator if text is None else PlacedGenerator(seed)
    windows = held_out_windows(autoencoder, corpus)
    samples = 0 if prior is None else samples  # the twin's likelihood needs no bound
    bound = evaluate_bound(autoencoder, prior, windows, draws=draws, samples=samples, generator=noise)

    def cut(every: int) -> dict[str, Any] | None:
        pieces = held_out_windows(autoencoder, cut_documents(windows, every), windows.chunk_start)
        short = evaluate_bound(autoencoder, prior, pieces, draws=draws, generator=generator)
        return compare_contexts(bound.by_chunk, short.by_chunk, windows, pieces, every)

    return {
        "run": folder.resolve().name,
        "split": split if text is None else str(text),
        "text": corpus.fingerprint,
        "commit": _commit(folder),
        "seed": seed,
        "draws": draws,
        "samples": samples,
        "characters": windows.characters,
        "bits_per_character": bound.bits_per_character(),
        "perplexity": _perplexity(float(bound.nats.sum()), windows),
        "characters_per_chunk": None if prior is None else windows.characters / windows.chunks,
        "reconstruction": (
            None if prior is None else reconstruct(autoencoder, windows, prior.diffusion.gamma_0, generator)
        ),
        "alive": None if prior is None else signs_of_life(autoencoder, prior, windows),
        **continue_prompts(
            pipeline,
            choose_prompts(corpus, prompt_chunker(autoencoder), prompts, max_characters=max_characters),
            corpora["train"].text.tobytes(),
            max_characters=max_characters,
            seed=seed,
        ),
        "by_distance": by_distance(bound.by_chunk, windows),
        "context": {str(every): cut(every) for every in contexts} or None,
        "cost": _cost(folder, pipeline),
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


def _stages(folder: Path) -> list[Path]:
    return [folder / stage for stage in ("autoencoder", "prior") if (folder / stage).is_dir()]


def _cost(folder: Path, pipeline: HLDMPipeline) -> dict[str, float]:
    """Parameters, and seconds and characters of training, summed over the stages."""
    totals = [read_totals(stage) for stage in _stages(folder)]
    parts = [part for part in (pipeline.autoencoder, pipeline.prior) if part is not None]
    return {
        "parameters": sum(p.numel() for part in parts for p in part.parameters()),
        "train_seconds": sum(total.seconds for total in totals),
        "train_characters": sum(total.characters for total in totals),
    }


def _commit(folder: Path) -> str | None:
    """The commit that the run's last stage last started from, if it was a clone's."""
    path = _stages(folder)[-1] / "environment.json"
    return json.loads(path.read_text(encoding="utf-8"))[-1].get("commit") if path.exists() else None
