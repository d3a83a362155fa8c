"""BrierLM on bytes: how good a model's distribution is, from its samples alone (CALM, arXiv 2510.27688, section 4).

Brier-n = 100 E[2 p(y) - sum_x p(x)^2] over n-grams y of true text, strictly proper: the true distribution alone
reaches the most. Two independent samples x_1, x_2 after the same text estimate it without bias,

    1{x_1 = y} + 1{x_2 = y} - 1{x_1 = x_2},

so it is defined for every model that writes, needs no likelihood and no judge. BrierLM is the geometric mean of
n = 1..4. Here the grams are bytes, those that follow a place in held-out text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hldm.config import GenerationConfig
from hldm.evaluation.prompts import Prompt
from hldm.generation.pipeline import HLDMPipeline
from hldm.generation.writer import write_on
from hldm.text.bytes import to_bytes

GRAM = 4  # bytes of the longest n-gram, as CALM's tokens
END = 256  # stands for what follows the end that a model put to a document: no byte of the text
ROWS = 64  # written at once


class Brier(NamedTuple):
    """BrierLM, from 0 (below it where estimates are negative: then 0) to 100, and its standard error."""

    value: float
    standard_error: float  # over places, by the jackknife


def brier_terms(first: np.ndarray, second: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """1{x_1 = y} + 1{x_2 = y} - 1{x_1 = x_2} of the first 1, 2, ... symbols. (places n), three times -> (places n)."""
    if not first.shape == second.shape == truth.shape or truth.ndim != 2:
        raise ValueError(
            f"two samples and the truth are (places n) each, got {first.shape}, {second.shape} and {truth.shape}"
        )

    def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.logical_and.accumulate(a == b, axis=1).astype(float)

    return alike(first, truth) + alike(second, truth) - alike(first, second)


def brier_lm(terms: np.ndarray) -> Brier:
    """100 (prod_n mean_n)^(1/N) of `brier_terms` (places N). Raises ValueError for fewer than two places."""
    places, _ = terms.shape
    if places < 2:
        raise ValueError(f"BrierLM needs at least 2 places to know its error, got {places}")

    def mean(scores: np.ndarray) -> np.ndarray:
        return 100 * np.exp(np.log(scores.clip(min=1e-300)).mean(axis=-1)) * (scores > 0).all(axis=-1)

    total = terms.sum(axis=0)
    without = mean((total - terms) / (places - 1))  # (places,) each left out once
    error = np.sqrt((places - 1) / places * np.square(without - without.mean()).sum())
    return Brier(float(mean(total / places)), float(error))


def symbols(texts: Sequence[bytes], length: int = GRAM) -> np.ndarray:
    """The first bytes of texts (texts length), END where one is shorter."""
    rows = np.full((len(texts), length), END)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = [*text[:length]]
    return rows


def measure_brier(
    pipeline: HLDMPipeline, settings: GenerationConfig, places: Sequence[Prompt], *, seed: int
) -> Brier:
    """BrierLM of what a pipeline writes at places of a text. Place i draws from seeds seed + 2 i and the next."""
    prompts = [place.text for place in places for _ in range(2)]
    written: list[bytes] = []
    for start in range(0, len(prompts), ROWS):
        writing = write_on(
            pipeline.autoencoder,
            pipeline.prior,
            prompts[start : start + ROWS],
            settings,
            max_characters=GRAM,
            seed=seed + start,
        )
        rows, _, _ = deque(writing, maxlen=1).pop()
        written += [row.text for row in rows]
    drawn = symbols(written)
    return brier_lm(
        brier_terms(drawn[::2], drawn[1::2], symbols([to_bytes(place.continuation) for place in places]))
    )
