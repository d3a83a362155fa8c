"""Does far context help? Bits per character by the distance from the document's start, and with documents cut short.

The first alone is not enough: later text may be another kind of text. So documents can be cut every so many bytes, and
each piece be read as if it were a document. The same bytes are then compared, with all their context and with little of
it. Counted are bytes with at least half of a piece before them, and with more context in the whole document: no first
pieces; nor the last chunk of a piece, whose cost includes a false end. Models that were seldom trained on the
middle of a text have a higher cost there, too. Arithmetic on the nats of every chunk (`hldm.evaluation.bound`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hldm.evaluation.metrics import ratio_error
from hldm.text.corpus import Corpus

if TYPE_CHECKING:
    from hldm.text.windows import Windows

DISTANCES = (0, 100, 1_000, 10_000)  # bytes from the document's start, where buckets begin


class Places(NamedTuple):
    """Where the chunks of a corpus lie."""

    start: np.ndarray  # (chunks,) first byte in the corpus
    document: np.ndarray  # (chunks,)
    distance: np.ndarray  # (chunks,) bytes from the document's start
    characters: np.ndarray  # (chunks,)

    @classmethod
    def of(cls, windows: Windows) -> Places:
        """Of all chunks, by chunk_index."""
        corpus, start = windows.corpus, np.flatnonzero(windows.chunk_start)
        document = np.searchsorted(corpus.offsets, start, side="right") - 1
        characters = np.add.reduceat(corpus.text & 0xC0 != 0x80, start, dtype=np.int64)
        return cls(start, document, start - corpus.offsets[document], characters)


def by_distance(
    nats: np.ndarray, windows: Windows, distances: Sequence[int] = DISTANCES
) -> dict[str, dict[str, Any] | None]:
    """Bits per character of the chunks that begin at least so far from their document's start, up to the next bucket.

    nats: (chunks,);  the standard error is that of another text, from the spread over documents
    distances: rising from 0, where buckets begin;  None for a bucket without characters
    """
    places = Places.of(windows)
    bucket = np.searchsorted(distances, places.distance, side="right") - 1
    return {
        str(first): _ratio(nats, places.characters, places.document, bucket == index)
        for index, first in enumerate(distances)
    }


def cut_documents(windows: Windows, every: int) -> Corpus:
    """The same text as more documents: each begins anew at the first chunk from every multiple of so many bytes on."""
    places = Places.of(windows)
    is_first = np.diff(places.document, prepend=-1) | np.diff(places.distance // every, prepend=-1) != 0
    corpus = windows.corpus
    offsets = np.append(places.start[is_first], len(corpus.text)).astype(np.int64)
    return Corpus(f"{corpus.name}, cut every {every} bytes", corpus.text, offsets)


def compare_contexts(
    whole: np.ndarray, cut: np.ndarray, windows: Windows, pieces: Windows, every: int
) -> dict[str, Any] | None:
    """Bits per character with documents cut and whole, on the same chunks; None where there are none to compare.

    whole, cut: (chunks,) nats of the same chunks;  windows, pieces: whose they are
    The standard error is of the difference, from its spread over pieces.
    """
    document, piece = Places.of(windows), Places.of(pieces)
    is_last = np.append(np.diff(piece.document) != 0, True)
    counted = (piece.distance >= every / 2) & ~is_last & (document.distance >= every)
    short, full, saved = (
        _ratio(nats, piece.characters, piece.document, counted) for nats in (cut, whole, cut - whole)
    )
    if short is None or full is None or saved is None:
        return None
    return {
        "characters": short["characters"],
        "bits_per_character": short["bits_per_character"],
        "whole": full["bits_per_character"],
        "saved": saved["bits_per_character"],
        "standard_error": saved["standard_error"],
    }


def _ratio(
    nats: np.ndarray, characters: np.ndarray, group: np.ndarray, counted: np.ndarray
) -> dict[str, Any] | None:
    """Bits per character of the chunks counted, and its standard error from the spread over groups (linearised)."""
    nats, characters = (np.bincount(group[counted], weights=values[counted]) for values in (nats, characters))
    if not characters.sum():
        return None
    nats, characters = nats[characters > 0], characters[characters > 0]
    unit = characters * math.log(2)
    return {
        "characters": int(characters.sum()),
        "bits_per_character": float(nats.sum() / unit.sum()),
        "standard_error": ratio_error(nats, unit),
    }


def rows(columns: Collection[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Rows of evaluation's table: label, dotted key, format; distances and lengths that some column has."""
    limits = [f"{first:,} to {last:,}" for first, last in zip(DISTANCES, DISTANCES[1:], strict=False)]
    found = []
    for first, limit in zip(map(str, DISTANCES), [*limits, f"{DISTANCES[-1]:,} on"], strict=True):
        if any(column["by_distance"][first] for column in columns):
            key = f"by_distance.{first}"
            found.append((f"bits of bytes {limit} of each text", f"{key}.bits_per_character", ".4f"))
            found.append(("  standard error, another text", f"{key}.standard_error", ".4f"))
    for length in sorted({int(length) for column in columns for length in column["context"] or ()}):
        key = f"context.{length}"
        found.append((f"documents cut every {length:,} bytes", f"{key}.bits_per_character", ".4f"))
        found.append(("  the same bytes, not cut", f"{key}.whole", ".4f"))
        found.append(("  context from farther away saves", f"{key}.saved", ".4f"))
        found.append(("    standard error", f"{key}.standard_error", ".4f"))
    return found
