"""An artificial language without spaces, whose best chunks are known: its words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hldm.text.corpus import Corpus, make_corpus

LETTERS = b"abcdefghijkl"


class Language(NamedTuple):
    """A text and where its words start."""

    corpus: Corpus
    is_word_start: np.ndarray  # (t,) bool
    mean_bytes: float  # of a word


def unsegmented(words: int = 40, size: int = 40_000, seed: int = 0) -> Language:
    """A Markov chain over random words of 3 to 7 of 12 letters; some 4 words follow each."""
    rng = np.random.default_rng(seed)
    lexicon: set[bytes] = set()
    while len(lexicon) < words:
        lexicon.add(bytes(rng.choice(list(LETTERS), rng.integers(3, 8)).tolist()))
    follows = rng.dirichlet(np.full(words, 0.3), size=words)
    ordered, pieces, starts, length, word = sorted(lexicon), [], [], 0, 0
    while length < size:
        word = int(rng.choice(words, p=follows[word]))
        pieces.append(ordered[word])
        starts.append(length)
        length += len(ordered[word])
    is_start = np.zeros(length, bool)
    is_start[starts] = True
    return Language(make_corpus("words without spaces", [b"".join(pieces)]), is_start, length / len(starts))


def boundary_f1(found: np.ndarray, true: np.ndarray) -> float:
    """Harmonic mean of precision and recall of chunk starts, the text's own start left out."""
    both = int((found & true)[1:].sum())
    return 2 * both / int(found[1:].sum() + true[1:].sum())
