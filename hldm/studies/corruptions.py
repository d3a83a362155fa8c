"""Text as it should not be: typing errors, case at random, spaces left out. Seeded; the length stays about the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hldm.text.corpus import Corpus, make_corpus

RATE = 0.05  # share of the bytes, or of the spaces, that are touched


def typos(text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Letters changed places with the next, left out or struck twice, as often each. text (t,) uint8."""
    is_letter = ((text | 0x20) >= ord("a")) & ((text | 0x20) <= ord("z"))
    hit = is_letter & (rng.random(len(text)) < RATE)
    hit[1:] &= ~hit[:-1]  # no letter is touched twice
    kind = rng.integers(0, 3, len(text))
    swapped = np.flatnonzero(hit & (kind == 0))
    swapped = swapped[swapped + 1 < len(text)]
    swapped = swapped[is_letter[swapped + 1]]
    text = text.copy()
    text[swapped], text[swapped + 1] = text[swapped + 1], text[swapped]
    return np.repeat(text, np.where(hit & (kind == 1), 0, np.where(hit & (kind == 2), 2, 1)))


def case_noise(text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Letters a to z in the other case."""
    is_letter = ((text | 0x20) >= ord("a")) & ((text | 0x20) <= ord("z"))
    return np.where(is_letter & (rng.random(len(text)) < RATE), text ^ 0x20, text)


def dropped_spaces(text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Spaces left out, four times as often as a letter is touched: there are fewer of them."""
    return text[~((text == ord(" ")) & (rng.random(len(text)) < 4 * RATE))]


CORRUPTIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "typos": typos,
    "case": case_noise,
    "spaces": dropped_spaces,
}


def corrupt(corpus: Corpus, kind: str, seed: int = 0) -> Corpus:
    """Every document of a corpus, corrupted."""
    rng = np.random.default_rng(seed)
    documents = (CORRUPTIONS[kind](document, rng).tobytes() for document in corpus)
    return make_corpus(f"{corpus.name}, {kind}", documents)
