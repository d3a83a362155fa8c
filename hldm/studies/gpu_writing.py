"""Writing on a GPU: its speed, and the same text from the same seed."""

from __future__ import annotations

from typing import Any

import torch

from hldm.chunking.chunker import make_chunker
from hldm.config import ChunkingConfig
from hldm.generation.pipeline import HLDMPipeline, HLDMPipelineOutput
from hldm.generation.writer import make_writer, row_generators
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.runs.clock import timed
from hldm.runs.files import fingerprint
from hldm.sources.corpora import load_corpus
from hldm.studies.bench_writing import write_like
from hldm.studies.gpu_card import Card
from hldm.text.bytes import count_characters

CHARACTERS = 240  # written, in all, at least
WRITING_S = 22.5  # or as many as fit


def _models(card: Card) -> tuple[Autoencoder, Prior]:
    """Both, untrained, writing bytes by their frequency in the built-in text."""
    config = card.config
    torch.manual_seed(config.seed)
    autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking).eval()
    if config.chunking.needs_segmenter:
        autoencoder.attached_chunker = make_chunker(ChunkingConfig())
    corpus = load_corpus(config.data, "validation")
    write_like(autoencoder, corpus, len(corpus.text) // 6)
    prior = Prior.from_settings(config.autoencoder, config.prior, config.hierarchy, config.diffusion)
    prior.register_to_config(autoencoder=fingerprint(autoencoder.state_dict()))
    return autoencoder.to(card.device), prior.eval().to(card.device)


def writing(card: Card) -> tuple[str, dict[str, Any]]:
    """Characters a second, one continuation and 64."""
    models, found = _models(card), {}
    for rows in (1, 64):
        with torch.inference_mode():
            writer = make_writer(
                *models, [b"In the beginning "] * rows, card.config.generation, row_generators(0, rows)
            )
            writer.write()  # warm-up
            seconds, characters = 0.0, 0
            while characters < CHARACTERS * min(rows, 8) and seconds < WRITING_S:
                pieces, taken = timed(writer.write)
                seconds += taken
                characters += sum(count_characters(piece.text) for piece in pieces)
        found[f"characters_per_second_{rows}"] = characters / seconds
    one, many = found.values()
    steps = card.config.generation.steps
    return f"{steps} steps a latent: {one:,.0f} characters/s in 1 row, {many:,.0f} in 64", found


def generators(card: Card) -> tuple[str, dict[str, Any]]:
    """Seeds and a generator of the device give the same text twice; a batch writes what its rows write."""
    pipeline = HLDMPipeline.assemble(*_models(card), card.config.generation)

    def write(prompts: list[str], **arguments: Any) -> list[str]:
        output = pipeline(prompts, max_characters=40, **arguments)
        assert isinstance(output, HLDMPipelineOutput)
        return output.texts

    prompts = ["In the beginning ", "And "]
    texts = write(prompts, seed=3)
    drawn = [write(prompts, generator=torch.Generator(card.device).manual_seed(3)) for _ in range(2)]
    if drawn[0] != drawn[1]:
        raise AssertionError("a generator of the device gave two texts from one seed")
    if write(prompts, seed=3) != texts:
        raise AssertionError("a seed gave two texts")
    alone = [write([prompt], seed=3 + row)[0] for row, prompt in enumerate(prompts)]
    # products of other shapes round otherwise, and a draw at a border then falls on its other side
    same = sum(one == other for one, other in zip(alone, texts, strict=True))
    found = {"rows_as_alone": same, "rows": len(prompts)}
    return f"the same text twice by seed and by generator; {same} of {len(prompts)} rows as alone", found
