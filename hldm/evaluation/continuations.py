"""Continuations of held-out prompts: how near they come to the true ones, how varied they are, how fast written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hldm.chunking.chunker import Chunker
from hldm.chunking.strategies import chunker_of
from hldm.config import GenerationConfig
from hldm.evaluation.metrics import compute, diversity, random_passage, repeat_last_words
from hldm.evaluation.prompts import Prompt
from hldm.generation.pipeline import HLDMPipeline
from hldm.generation.writer import Continuation, write_on
from hldm.runs.doing import doing, reached
from hldm.text.bytes import count_characters


class Written(NamedTuple):
    """Continuations of several prompts, and what they took."""

    rows: Sequence[Continuation]
    characters_per_second: float  # of all rows together
    denoising_calls: int


def write_batch(
    pipeline: HLDMPipeline,
    settings: GenerationConfig,
    prompts: Sequence[bytes],
    *,
    max_characters: int,
    seed: int,
) -> Written:
    """Continue all prompts at once for `max_characters`, on through the ends of documents."""
    began = time.perf_counter()
    parts = pipeline.autoencoder, pipeline.prior, prompts, settings
    writing = write_on(*parts, max_characters=max_characters, seed=seed, through_ends=True)
    rows: list[Continuation] = []
    calls = 0
    for rows, _, calls in writing:  # noqa: B007 - the last yield is the finished text
        reached(sum(max_characters - row.left for row in rows), max_characters * len(rows))
    seconds = time.perf_counter() - began
    return Written(rows, sum(count_characters(row.text) for row in rows) / seconds, calls)


def continue_prompts(
    pipeline: HLDMPipeline,
    prompts: Sequence[Prompt],
    training_text: bytes | None,
    *,
    max_characters: int,
    seed: int,
) -> dict[str, Any]:
    """ROUGE, diversity, re-chunking and speed of continuations written in one batch; each None without prompts.

    ROUGE compares with the true continuation, and so does it two baselines that read nothing: the prompt's last words
    repeated, and a random passage of the training text, where that is at hand. Re-chunking: the share of written
    chunks that start where the strategy starts one, reading what was written; None for the twin.
    """
    if not prompts:
        return {"prompts": 0, "rouge": None, "diversity": None, "rechunked": None, "speed": None}
    wanted = [prompt.continuation for prompt in prompts]
    starts = [prompt.text for prompt in prompts]
    generator = torch.Generator().manual_seed(seed)
    baselines = {
        "repeat_prompt": [
            repeat_last_words(text.decode("utf-8", "replace"), max_characters) for text in starts
        ],
    }
    if training_text is not None:
        baselines["random_passage"] = [
            random_passage(training_text, max_characters, generator) for _ in prompts
        ]
    with doing(f"writing {len(prompts)} continuations"):
        found = write_batch(pipeline, pipeline.settings, starts, max_characters=max_characters, seed=seed)
    written = [row.text.decode("utf-8", errors="replace") for row in found.rows]
    return {
        "prompts": len(prompts),
        "rouge": {
            **compute("Rouge", predictions=written, references=wanted),
            "baselines": {
                name: compute("Rouge", predictions=texts, references=wanted)
                for name, texts in baselines.items()
            },
        },
        "diversity": {**diversity(written), "reference": diversity(wanted)},
        "rechunked": None
        if pipeline.prior is None
        else rechunked(found.rows, chunker_of(pipeline.autoencoder)),
        "speed": {
            "characters_per_second": found.characters_per_second,
            "denoising_calls": found.denoising_calls,
        },
    }


def rechunked(rows: Sequence[Continuation], chunker: Chunker) -> float | None:
    """F1 of where written chunks start and where the strategy, reading them, starts some: 2 both / (written + found).

    The first chunk of a row is left out: it starts where the prompt ends. None where that leaves nothing.
    """
    both = either = 0
    for row in rows:
        first = len(row.prompt)
        written = first + np.cumsum([len(chunk) for chunk in row.chunks[:-1]], dtype=int)
        found = np.flatnonzero(chunker.chunk_start(row.prompt + row.text))
        found = found[found > first]
        both += len(np.intersect1d(written, found))
        either += len(written) + len(found)
    return 2 * both / either if either else None
