"""The strategies that ask a trained segmenter: their classes, a saved one read, attached to a model, cutting a corpus.

runs/<name>/segmenter/model/         weights and threshold
runs/<name>/segmenter/boundaries-*   where the chunks of a corpus start, by what they depend on
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from hldm.chunking.chunker import Chunker, make_chunker
from hldm.chunking.entropy import EntropySegmenter
from hldm.chunking.learned import LearnedSegmenter
from hldm.chunking.own import check_mark, own_chunker
from hldm.chunking.phrase import PhraseSegmenter
from hldm.chunking.recurrence import GateSegmenter, StateSegmenter
from hldm.chunking.reinforce import PolicySegmenter
from hldm.chunking.segmenter import Segmenter
from hldm.chunking.select import QuerySegmenter, SelectSegmenter
from hldm.config import ChunkingConfig, ConfigError, changed, to_dict
from hldm.model.autoencoder import Autoencoder
from hldm.runs.files import atomic_write, fingerprint
from hldm.runs.folder import shipped
from hldm.runs.provenance import code_fingerprint
from hldm.settings import is_own
from hldm.text.corpus import Corpus

SEGMENTERS: dict[str, type[Segmenter]] = {
    "entropy": EntropySegmenter,
    "state_change": StateSegmenter,
    "gate": GateSegmenter,
    "learned": LearnedSegmenter,
    "reinforce": PolicySegmenter,
    "select": SelectSegmenter,
    "queries": QuerySegmenter,
    "phrase": PhraseSegmenter,
}


def sample_of(corpus: Corpus, size: int) -> list[np.ndarray]:
    """Beginnings of documents spread over a corpus, about `size` bytes in all."""
    documents = min(len(corpus), 16)
    most = -(-size // documents)
    picked = np.linspace(0, len(corpus) - 1, documents).astype(int)
    return [corpus.document(int(index))[:most] for index in picked]


def read_segmenter(folder: Path, chunking: ChunkingConfig) -> Segmenter | None:
    """The segmenter saved in a folder, None for a strategy that needs none.

    Raises FileNotFoundError, ValueError where it is missing, damaged or made with other settings.
    """
    if not chunking.needs_segmenter:
        return None
    segmenter = SEGMENTERS[chunking.strategy].from_pretrained(folder)
    if segmenter.chunking != chunking:
        raise ConfigError(
            f"{folder} was made with other settings of chunking: set them back, or choose another --name"
        )
    return segmenter.eval()


def shipped_segmenter(chunking: ChunkingConfig, documents: Sequence[np.ndarray]) -> Segmenter:
    """The segmenter that comes with hldm for a strategy, within these limits, its threshold set on these documents.

    Raises FileNotFoundError in a copy of hldm without it.
    """
    strategy = chunking.strategy
    segmenter = SEGMENTERS[strategy].from_pretrained(shipped(f"segmenters/{strategy}")).eval()
    limits = {name: getattr(chunking, name) for name in ("min_bytes", "max_bytes", "target_bytes")}
    segmenter.chunking = changed(segmenter.chunking, **limits)
    segmenter.calibrate(documents)
    return segmenter


def chunker_of(autoencoder: Autoencoder) -> Chunker:
    """What cuts text for a model. Raises ConfigError where that takes a segmenter and none was attached."""
    attached = autoencoder.attached_chunker
    return make_chunker(autoencoder.chunking) if attached is None else cast(Chunker, attached)


def attach_segmenter(autoencoder: Autoencoder, segmenter: Segmenter | None) -> None:
    """Have an autoencoder's text cut by a segmenter, which its saved config names from now on.

    None: by the class of the user's own that its settings name, if any, which is remembered likewise.
    Raises ValueError when it was trained on another's chunks.
    """
    chunking = autoencoder.chunking
    if segmenter is None:
        if is_own(chunking.strategy):
            chunker = own_chunker(chunking)
            check_mark(chunker, autoencoder.config["segmenter"])
            autoencoder.register_to_config(segmenter=chunker.mark)
            autoencoder.attached_chunker = chunker
        return
    mark = fingerprint(segmenter.state_dict())
    if autoencoder.config["segmenter"] not in ("", mark):
        raise ValueError(
            "this autoencoder was trained on another segmenter's chunks: restore that, or train again"
        )
    autoencoder.register_to_config(segmenter=mark)
    autoencoder.attached_chunker = segmenter.chunker(chunking.min_bytes, chunking.max_bytes)


def cached_starts(
    folder: Path, segmenter: Segmenter, corpus: Corpus, at_block: Callable[[], object] = lambda: None
) -> np.ndarray:
    """(t,) bool: where the chunks of a corpus start, read from `folder` or made and left there.

    The file's name says what it depends on, its head what it holds: one that is damaged is made again.
    """
    chunking = segmenter.chunking
    weights = fingerprint(segmenter.state_dict())
    bound = json.dumps([corpus.fingerprint, weights, to_dict(chunking), code_fingerprint()])
    path = folder / f"boundaries-{hashlib.sha256(bound.encode()).hexdigest()[:16]}"
    size = len(corpus.text)
    if path.is_file():
        data = path.read_bytes()
        digest, packed = data[:32], data[32:]
        if hashlib.sha256(packed).digest() == digest and len(packed) == -(-size // 8):
            return np.unpackbits(np.frombuffer(packed, np.uint8), count=size).astype(bool)
    chunker = segmenter.chunker(chunking.min_bytes, chunking.max_bytes)
    found = chunker.chunk_starts([corpus.document(index) for index in range(len(corpus))], at_block)
    packed = np.packbits(found).tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, hashlib.sha256(packed).digest() + packed)
    return found
