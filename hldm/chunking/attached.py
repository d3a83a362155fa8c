"""What cuts the text of a model: the chunker of its settings or, once attached, that of a segmenter."""

from __future__ import annotations

from typing import cast

from hldm.chunking.chunker import Chunker, make_chunker
from hldm.model.autoencoder import Autoencoder


def chunker_of(autoencoder: Autoencoder) -> Chunker:
    """What cuts text for a model. Raises ConfigError where that takes a segmenter and none was attached."""
    if autoencoder.attached_chunker is not None:
        return cast(Chunker, autoencoder.attached_chunker)
    return make_chunker(autoencoder.chunking)


def attach_chunker(autoencoder: Autoencoder, chunker: Chunker, segmenter: str) -> None:
    """Cut a model's text by a segmenter of this fingerprint, which its saved config names from now on.

    Raises ValueError when it was trained on another's chunks.
    """
    if autoencoder.config["segmenter"] not in ("", segmenter):
        raise ValueError(
            "this autoencoder was trained on another segmenter's chunks: restore that, or train again"
        )
    autoencoder.register_to_config(segmenter=segmenter)
    autoencoder.attached_chunker = chunker
