"""A corpus laid out for a model to read in order: cut into its chunks, whole documents, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hldm.chunking.chunker import Chunker, make_chunker
from hldm.chunking.strategies import chunker_of
from hldm.config import ChunkingConfig
from hldm.model.autoencoder import Autoencoder
from hldm.model.state import Encoding
from hldm.text.corpus import Corpus
from hldm.text.windows import Batch, Windows

LANES, WINDOW_BYTES = 16, 512  # measured, configs/tiny.yaml on a CPU: 256 and 1024 bytes take longer
TWIN_WORDS = ChunkingConfig(strategy="words", min_bytes=4, max_bytes=12)  # those of the reports so far


def prompt_chunker(autoencoder: Autoencoder) -> Chunker:
    """What cuts a model's prompts: its own chunker, for the twin (which goes on from anywhere) TWIN_WORDS."""
    return chunker_of(autoencoder) if autoencoder.latent_dim else make_chunker(TWIN_WORDS)


def held_out_windows(
    autoencoder: Autoencoder,
    corpus: Corpus,
    chunk_start: np.ndarray | None = None,
    *,
    lanes: int = LANES,
    closes: np.ndarray | None = None,
) -> Windows:
    """A corpus laid out for reading whole documents in order, in `lanes` streams side by side.

    chunk_start: (t,) bool where its chunks start, if they have been computed. The twin's are
    TWIN_WORDS: they do not change its cost, but costs are reported by chunk, and its own are as long as its attention
    sees.
    closes: (documents,) bool which of them end with their last byte; None: all
    """
    chunker = prompt_chunker(autoencoder)
    return Windows(
        corpus,
        chunker,
        lanes=lanes,
        window_bytes=max(WINDOW_BYTES, 2 * chunker.max_bytes),
        shuffle=False,
        chunk_start=chunk_start,
        closes=closes,
    )


def read_windows(autoencoder: Autoencoder, windows: Windows) -> Iterator[tuple[Batch, Encoding]]:
    """Every window on the model's device, and what the encoder makes of it, its state carried along."""
    device = next(autoencoder.parameters()).device
    state = autoencoder.encoder_state(windows.lanes, device)
    for step in range(windows.windows_per_epoch):
        batch = windows.batch(step).to(device)
        encoding, state = autoencoder.encode(batch, state)
        yield batch, encoding
