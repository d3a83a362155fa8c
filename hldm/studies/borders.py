"""How chunks lie in a text: their lengths, and how often they start where a word, a sentence, a verse does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hldm.chunking.chunker import SentenceChunker, WordsChunker

WHITE_SPACE = np.frombuffer(b" \t\n\v\f\r", np.uint8)


def describe_chunks(
    documents: Sequence[np.ndarray], is_start: np.ndarray, verses: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """Characters a chunk, their mean and coefficient of variation; how many kinds of chunks; where borders lie.

    kinds: different chunks a chunk. The fewer, the more often a latent that is to be foreseen has been seen before.
    borders: precision and recall of chunk starts as those of words, sentences, verses
    is_start: (t,) bool, chunk starts of all documents in a row
    verses: for each document the places (n,) where its verses start, if it has any
    """
    text = np.concatenate(documents)
    edges = np.append(np.flatnonzero(is_start), len(text))
    content = text.tobytes()
    kinds = {content[begin:end] for begin, end in zip(edges[:-1], edges[1:], strict=True)}
    character = np.append(0, np.cumsum(text & 0xC0 != 0x80))[edges]
    length = np.diff(character)
    offsets = np.append(0, np.cumsum([len(document) for document in documents]))
    borders = {
        name: np.concatenate([chunker(1, 2**16).borders(document.tobytes()) for document in documents])
        for name, chunker in (("word", WordsChunker), ("sentence", SentenceChunker))
    }
    if verses is not None:
        borders["verse"] = np.zeros(len(text), bool)
        for document, offset, places in zip(documents, offsets, verses, strict=False):
            # data.max_bytes may end a document early
            borders["verse"][offset + places[(places > 0) & (places < len(document))]] = True
    opens = np.zeros(len(text), bool)
    opens[offsets[:-1][np.diff(offsets) > 0]] = True  # no choice of the strategy's
    return {
        "characters_per_chunk": float(length.mean()),
        "variation": float(length.std() / length.mean()),
        "kinds": len(kinds) / len(length),
        "borders": {
            name: agree(text, is_start & ~opens, border & ~opens) for name, border in borders.items()
        },
    }


def agree(text: np.ndarray, found: np.ndarray, true: np.ndarray) -> Mapping[str, float | None]:
    """Share of found borders that are true, and of true ones that are found.

    A border before white space and one after it are the same. found, true: (t,) bool
    """
    place = np.arange(len(text))
    is_black = ~np.isin(text, WHITE_SPACE)
    black = np.where(is_black, place, len(text))[::-1]
    after = np.minimum.accumulate(black)[::-1]  # the next byte that is none
    one, other = (np.unique(after[np.flatnonzero(borders)]) for borders in (found, true))
    both = len(np.intersect1d(one, other))
    return {
        "precision": both / len(one) if len(one) else None,
        "recall": both / len(other) if len(other) else None,
    }
