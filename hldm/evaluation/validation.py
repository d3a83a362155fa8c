"""Validation while a model trains: the bound of `hldm.evaluation.bound` on a fixed slice of text under fixed noise.

Two figures of one training therefore differ by what was learnt in between. They are not those of the whole text, where
documents are read from end to end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hldm.evaluation.bound import evaluate_bound, held_out_windows
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.sources.encodings import line_border
from hldm.text.corpus import Corpus, make_corpus

PIECES = 8  # read side by side
LEAST_BYTES = 512  # of a document that is cut: a window's worth
DRAWS = 4  # noise levels a chunk: a standard error of 0.002 bits on 8 KiB, configs/tiny.yaml


def validation_on(
    autoencoder: Autoencoder, corpus: Corpus, size: int, seed: int
) -> Callable[[Autoencoder, Prior | None], dict[str, float]]:
    """What measures a model in training on about `size` bytes of a corpus: bits a character, the bound and its terms.

    autoencoder: what cuts the text; later ones must cut it alike
    """
    windows = held_out_windows(autoencoder, slice_of(corpus, size))

    def measure(autoencoder: Autoencoder, prior: Prior | None) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed)
        bound = evaluate_bound(autoencoder, prior, windows, draws=DRAWS, generator=generator)
        found = bound.bits_per_character()
        kept = ("bound", "latent", "decoder", "end", *(["answer"] if found["answer"] is not None else []))
        return {name: found[name] or 0.0 for name in kept}

    return measure


def slice_of(corpus: Corpus, size: int) -> Corpus:
    """The beginnings of documents spread over a corpus, of `size` bytes in all where they are long enough.

    Fewer documents than PIECES are cut first: read from end to end, a single one takes twice as long.
    """
    if len(corpus) < PIECES and corpus.question_bytes is None:
        corpus = _cut(corpus, -(-PIECES // len(corpus)))
    most = -(-size // min(len(corpus), PIECES))
    # short documents do not fill a piece each: as many more of them
    filled = np.minimum(np.diff(corpus.offsets), most).mean()
    count = min(len(corpus), max(PIECES, round(size / filled)))
    picked = np.linspace(0, len(corpus) - 1, count).astype(int)
    sizes = [len(_whole_characters(corpus.document(int(index)), most)) for index in picked]
    pieces = [corpus.beginning(int(index), size) for index, size in zip(picked, sizes, strict=True)]
    return make_corpus(f"{corpus.name}, a slice", pieces)


def _cut(corpus: Corpus, parts: int) -> Corpus:
    """Each document in so many parts of about one length, at the starts of lines or words; fewer where it is short."""
    pieces: list[bytes] = []
    for document in map(np.ndarray.tobytes, corpus):
        number = max(min(parts, len(document) // LEAST_BYTES), 1)
        inside = (line_border(document, part * len(document) // number) for part in range(1, number))
        borders = [0, *sorted(inside), len(document)]
        pieces += [document[a:b] for a, b in zip(borders, borders[1:], strict=False)]
    return make_corpus(corpus.name, pieces)


def _whole_characters(text: np.ndarray, most: int) -> bytes:
    """At most so many bytes, or up to 3 less where that would split a UTF-8 character."""
    kept = text[: most + 1].tobytes()
    if len(kept) <= most:
        return kept
    cut = next((cut for cut in range(most, max(most - 4, 0), -1) if kept[cut] & 0xC0 != 0x80), most)
    return kept[:cut]
