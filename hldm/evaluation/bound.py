"""The bound of `hldm.training.objectives` over a whole corpus, in bits a character, and how sure of it one may be.

Every document is read whole, its state carried from window to window, so how the text is laid out in streams
and windows changes the random draws and nothing else. The sum includes every byte and every end of a
chunk and of a document: it bounds the size of a file compressed with the model. For the twin it is no
bound but the likelihood itself. The estimate of each chunk is `hldm.generation.bound`'s.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from hldm.chunking.reading import held_out_windows as held_out_windows
from hldm.evaluation.metrics import ratio_error
from hldm.generation.bound import bound_chunks
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.text.bytes import count_characters
from hldm.text.windows import Windows


class Bound(NamedTuple):
    """What a corpus costs under a model: nats of every document, by term, and the noise in their sum."""

    decoder: np.ndarray  # (documents,) bytes and ends, given the latents
    latent: np.ndarray  # (documents,) the diffusion term
    end: np.ndarray  # (documents,) KL(q(z_1) || N(0, I))
    variance: float  # nats^2 of the sum of all, from the draws of noise and noise levels alone
    characters: np.ndarray  # (documents,)
    by_chunk: np.ndarray  # (chunks,) nats of all three terms
    answer: float | None = None  # nats of the answers a character of them; None where there are no questions
    importance: np.ndarray | None = None  # (documents,) the importance-weighted bound, if it was asked for

    @property
    def nats(self) -> np.ndarray:
        """All three terms of every document. (documents,)"""
        return self.decoder + self.latent + self.end

    def bits_per_character(self) -> dict[str, float | None]:
        """The bound, its terms, and two standard errors that answer different questions.

        standard_error:      of this corpus' bits given the model: Monte Carlo noise, which more draws lower
        standard_error_text: how much another text of this size and kind would differ, from the spread over
                             documents (of a ratio, by linearisation); None for a single document
        answer:              the bound of the answers alone, a character of them; None where there are no questions
        importance:          the tighter bound, with the mixture in place of the prior; None if not asked for
        """
        characters = self.characters.sum()
        unit = characters * math.log(2)
        bits = {name: float(getattr(self, name).sum() / unit) for name in ("latent", "decoder", "end")}
        return {
            "bound": float(self.nats.sum() / unit),
            "standard_error": math.sqrt(self.variance) / unit,
            "standard_error_text": ratio_error(self.nats, self.characters * math.log(2)),
            **bits,
            "answer": None if self.answer is None else self.answer / math.log(2),
            "importance": None if self.importance is None else float(self.importance.sum() / unit),
        }


def evaluate_bound(
    autoencoder: Autoencoder,
    prior: Prior | None,
    windows: Windows,
    *,
    draws: int = 8,
    samples: int = 0,
    generator: torch.Generator,
) -> Bound:
    """Sum the three terms over a corpus; for the twin (no prior) the decoder's alone, which needs no draws.

    draws, samples: see `hldm.generation.bound.bound_chunks`, which also says what raises ValueError
    """
    corpus = windows.corpus
    chunks = bound_chunks(autoencoder, prior, windows, draws=draws, samples=samples, generator=generator)
    document = np.searchsorted(corpus.offsets, np.flatnonzero(windows.chunk_start), side="right") - 1

    def by_document(nats: np.ndarray) -> np.ndarray:
        return np.bincount(document, weights=nats, minlength=len(corpus))

    variance = float(np.square(np.bincount(chunks.group, weights=chunks.difference)).sum()) / 4
    characters = [count_characters(document.tobytes()) for document in corpus]
    return Bound(
        by_document(chunks.decoder),
        by_document(chunks.latent),
        by_document(chunks.end),
        variance=variance,
        characters=np.array(characters),
        by_chunk=chunks.nats,
        answer=_answer_nats(chunks.nats, windows),
        importance=None if chunks.importance is None else by_document(chunks.importance),
    )


def _answer_nats(nats: np.ndarray, windows: Windows) -> float | None:
    """Nats (chunks,) of the answers a character of them."""
    if windows.is_answer is None:
        return None
    starts_character = windows.corpus.text & 0xC0 != 0x80
    characters = np.add.reduceat(starts_character.astype(np.int64), np.flatnonzero(windows.chunk_start))
    counted = int(characters[windows.is_answer].sum())
    return float(nats[windows.is_answer].sum()) / counted if counted else None
