"""What a text costs more without a part of the model: a paired difference with its standard error.

Both costs are of the same bytes, and share their noise where the model draws any, so most of the spread cancels. Chunks
near each other are not independent, so errors are taken over clusters: stretches of a document. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hldm.evaluation.metrics import ratio_error
from hldm.text.windows import Windows

STRETCH_BYTES = (
    400  # some 65 chunks of 6 bytes: long against a sentence, and 300 of them in the built-in test books
)


class Worth(NamedTuple):
    """Bits a character that are lost without a part; negative: it does harm."""

    bits: float
    standard_error: float | None  # over clusters; None where there is but one

    def as_json(self) -> dict[str, float | None]:
        """Both by name."""
        return {"bits": self.bits, "standard_error": self.standard_error}


class Clusters(NamedTuple):
    """Stretches of text that are taken to be independent of each other."""

    of_chunk: np.ndarray  # (chunks,) int: where each chunk starts; -1: not measured
    characters: np.ndarray  # (k,) of the measured chunks in each

    def sums(self, by_chunk: np.ndarray) -> np.ndarray:
        """Sum of the measured chunks' values in each cluster. (chunks,) -> (k,)."""
        measured = self.of_chunk >= 0
        return np.bincount(self.of_chunk[measured], by_chunk[measured], len(self.characters))


def clusters_of(windows: Windows, is_measured: np.ndarray | None = None) -> Clusters:
    """STRETCH_BYTES of a document are a cluster; they stand at the same bytes however a model cuts the text.

    is_measured: (chunks,) bool; None: all are
    """
    corpus = windows.corpus
    start = np.flatnonzero(windows.chunk_start)  # (chunks,) first byte of each
    document = np.searchsorted(corpus.offsets, start, side="right") - 1
    stretches = -(-np.diff(corpus.offsets) // STRETCH_BYTES)  # (documents,)
    before = np.cumsum(stretches) - stretches
    of_chunk = before[document] + (start - corpus.offsets[document]) // STRETCH_BYTES
    is_first_byte = corpus.text & 0xC0 != 0x80  # of a UTF-8 character
    characters = np.add.reduceat(is_first_byte, start, dtype=np.int64)
    if is_measured is not None:
        of_chunk, characters = np.where(is_measured, of_chunk, -1), characters * is_measured
    measured = of_chunk >= 0
    by_cluster = np.bincount(of_chunk[measured], characters[measured], int(stretches.sum()))
    return Clusters(of_chunk, by_cluster)


def paired_worth(without: np.ndarray, whole: np.ndarray, characters: np.ndarray) -> Worth:
    """The difference of two costs in nats, each summed by cluster (k,), in bits a character.

    characters: (k,) of each cluster; those without any do not count
    """
    counts = characters > 0
    difference, unit = (without - whole)[counts], characters[counts] * math.log(2)
    return Worth(float(difference.sum() / unit.sum()), ratio_error(difference, unit))


def least(hidden: Worth, retrained: Worth) -> Worth:
    """The worth of a part: the lesser of what hiding it costs and what a model trained without it loses.

    Hiding alone overstates it: a network misses whatever it was trained with.
    """
    return hidden if hidden.bits <= retrained.bits else retrained


def from_json(found: Mapping[str, Any]) -> Worth:
    """What `as_json` gave."""
    return Worth(found["bits"], found["standard_error"])
