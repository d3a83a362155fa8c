"""Sentences written from one vector, a concept: a decoder trained afterwards, and how good what it writes is.

The decoder is that of chunks, with sentences for chunks. It learns from true concepts, the target encoder's vectors,
and from predicted ones, which are what it has to write from in the end. Scores stand beside those of shuffled
concepts, another sentence's: what a decoder writes without reading its concept scores the same there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hldm.config import ChunkingConfig, changed
from hldm.evaluation.metrics import rouge_scores
from hldm.evaluation.tables import Table
from hldm.jepa.config import JepaConfig
from hldm.jepa.decoder import ChunkDecoder
from hldm.jepa.objective import DecoderObjective, JepaCarry, JepaStep
from hldm.jepa.sentences import SentenceObjective
from hldm.jepa.text_pairs import PairBatch
from hldm.jepa.tfidf import characters_3_to_5, tfidf
from hldm.jepa.views import make_view
from hldm.text.windows import Batch


def concept_decoder(config: JepaConfig) -> ChunkDecoder:
    """A decoder whose chunks are the config's sentences."""
    limits = {"min_bytes": config.sentences.min_bytes, "max_bytes": config.sentences.max_bytes}
    chunking = changed(ChunkingConfig(), strategy="sentence", **limits)
    return ChunkDecoder.from_settings(config.decoder, chunking, config.vector)


class ConceptObjective(DecoderObjective):
    """Nats of sentences from their true concepts and from predicted ones; the encoder is frozen."""

    jepa: SentenceObjective

    def initial_carry(self, rows: int, device: torch.device) -> JepaCarry:
        """Nothing: every text is read from a fresh state."""
        return JepaCarry(())

    def forward(  # type: ignore[override]
        self, batch: PairBatch, carry: JepaCarry, generator: torch.Generator, progress: float
    ) -> JepaStep:
        """Loss of a batch of pairs."""
        true, predicted = concepts_of(self.jepa, batch, generator)
        text, length = whole_texts(batch.target)
        nats = {"own": self.decoder.nats(true, text, length).sum()}
        if predicted is not None:
            nats["predicted"] = self.decoder.nats(predicted, text, length).sum()
        loss = torch.stack([*nats.values()]).sum() / batch.target.total_bytes
        return JepaStep(loss, {k: v.detach() for k, v in nats.items()}, batch.target.characters, carry)


@torch.no_grad()
def concepts_of(
    jepa: SentenceObjective, batch: PairBatch, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """True concepts (b z) of a batch's sentences, and what is predicted from their contexts (b z), at one scale."""
    true = jepa.sentence_target(batch.target)
    if jepa.predictor is None:
        return true, None
    window = make_view(batch.context, jepa.config.views, generator, jepa.letters).window
    predicted = jepa.predict_sentence(*jepa.read(window))
    return true, jepa.predictor.at_encoder_scale(predicted)


def whole_texts(window: Batch) -> tuple[Tensor, Tensor]:
    """The bytes (b l) and lengths (b) of whole rows."""
    return window.bytes, window.length


@torch.no_grad()
def score_concepts(jepa: SentenceObjective, decoder: ChunkDecoder, batch: PairBatch) -> list[dict[str, Any]]:
    """A record for true, predicted and shuffled concepts of held-out sentences, written freely.

    Shuffled: each sentence from the true concept of another; of the predicted ones likewise.
    """
    generator = torch.Generator().manual_seed(0)
    true, predicted = concepts_of(jepa, batch, generator)
    text, length = whole_texts(batch.target)
    right = [
        bytes(row[:size]).decode(errors="replace")
        for row, size in zip(text.tolist(), length.tolist(), strict=True)
    ]
    found = {"true": true, "shuffled": true.roll(1, dims=0)}
    if predicted is not None:
        found |= {"predicted": predicted, "predicted, shuffled": predicted.roll(1, dims=0)}
    records = []
    for name, concepts in found.items():
        written = [line.decode(errors="replace") for line in decoder.write_chunks(concepts)]
        bits = (
            float(decoder.nats(concepts, text, length).sum()) / math.log(2) / float(batch.target.characters)
        )
        records.append({"concepts": name, "bits_per_character": bits} | score_texts(written, right))
    return records


def score_texts(written: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """Edit similarity with its standard error, BLEU, chrF, ROUGE-L, and similarity of characters by TF-IDF."""
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
    from nltk.translate.chrf_score import corpus_chrf

    edits = np.array([edit_similarity(a, b) for a, b in zip(written, right, strict=True)])
    filled = [line if line.split() else "?" for line in written]  # nltk divides by the words
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no 4-gram in common is an answer
        bleu = corpus_bleu(
            [[line.split()] for line in right],
            [line.split() for line in filled],
            smoothing_function=SmoothingFunction().method1,
        )
    a, b = tfidf(characters_3_to_5, filled, list(right))
    return {
        "edit_similarity": float(edits.mean()),
        "standard_error": float(edits.std(ddof=1) / math.sqrt(len(edits))) if len(edits) > 1 else 0.0,
        "bleu": float(bleu),
        "chrf": float(corpus_chrf([[line] for line in right], filled)),
        "rougeL": rouge_scores(filled, right)["rougeL"] or 0.0,
        "tfidf_cosine": float(torch.sparse.sum(a * b) / len(right)),
    }


def edit_similarity(a: str, b: str) -> float:
    """1 - the least insertions, deletions and substitutions from a to b over the longer's length (Levenshtein 1966)."""
    if not a and not b:
        return 1.0
    x, y = np.array([*map(ord, a)], np.int64), np.array([*map(ord, b)], np.int64)
    place = np.arange(len(y) + 1)
    row = place.copy()
    for letter in x:
        best = np.minimum(row[1:] + 1, row[:-1] + (y != letter))  # from above, or diagonally
        row = np.concatenate([[row[0] + 1], best])
        row = np.minimum.accumulate(row - place) + place  # from the left: one more a step
    return 1 - float(row[-1]) / max(len(a), len(b))


def concepts_table(records: Sequence[dict[str, Any]]) -> Table:
    """A row a record."""
    return Table.of_records(
        records,
        {
            "concepts": ("concepts", "s"),
            "bits/char": ("bits_per_character", ".3f"),
            "edit similarity": ("edit_similarity", ".3f"),
            "±": ("standard_error", ".3f"),
            "BLEU": ("bleu", ".3f"),
            "chrF": ("chrf", ".3f"),
            "ROUGE-L": ("rougeL", ".3f"),
            "TF-IDF": ("tfidf_cosine", ".3f"),
        },
    )
