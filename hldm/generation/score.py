"""What single texts cost under a model, in bits: for ranking, comparing, and for benchmarks that choose between texts.

The estimator is that of evaluation (`hldm.generation.bound`), and so is the number for the same text, seed and draws.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np

from hldm.chunking.reading import held_out_windows, prompt_chunker
from hldm.generation.bound import ChunkBounds, bound_chunks
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.text.bytes import MAX_PROMPT_BYTES, count_characters, to_bytes
from hldm.text.corpus import make_corpus
from hldm.text.noise import PlacedGenerator

Texts = str | bytes | Sequence[str | bytes]


@dataclass(frozen=True)
class Score:
    """A bound on -log2 p(text), or of the text after its prefix; of the twin the likelihood itself."""

    bits: float  # all three terms
    standard_error: float  # of bits: Monte Carlo noise, which more draws lower; 0 for the twin
    characters: int
    decoder: float  # bits of bytes and ends, given the latents
    latent: float  # bits of the diffusion term
    end: float  # bits of KL(q(z_1) || N(0, I))
    importance: float | None = None  # the tighter bound, of `samples` importance-weighted draws a chunk
    importance_error: float | None = None  # its standard error; None for a single draw
    noise: tuple[float, ...] = field(
        default=(), repr=False
    )  # bits, half of what the passes differ by, by place

    @property
    def bits_per_character(self) -> float:
        """The bound by character of the text; the prefix does not count."""
        return self.bits / self.characters

    def minus(self, other: Score) -> tuple[float, float]:
        """How many bits more this text costs than the other, and the standard error of that.

        Under the noise that texts scored with one seed share, a difference is known better than either of them.
        """
        size = max(len(self.noise), len(other.noise))
        ours, theirs = (np.pad(score.noise, (0, size - len(score.noise))) for score in (self, other))
        return self.bits - other.bits, float(np.sqrt(np.square(ours - theirs).sum()))

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        record = {**asdict(self), "bits_per_character": self.bits_per_character}
        del record["noise"]
        return record


def as_documents(texts: Sequence[str | bytes], name: str = "texts") -> list[bytes]:
    """Texts as bytes. Raises ValueError, one line, for what is no text, holds nothing or is too long."""
    documents = []
    for index, text in enumerate(texts):
        if not isinstance(text, str | bytes):
            raise ValueError(f"{name}[{index}] must be str or bytes, got {type(text).__name__}")
        document = to_bytes(text) if isinstance(text, str) else text
        if not document:
            raise ValueError(f"{name}[{index}] is empty: there is nothing to read")
        if len(document) > MAX_PROMPT_BYTES:
            raise ValueError(
                f"{name}[{index}] has {len(document):,} bytes, and at most {MAX_PROMPT_BYTES:,} are read at once: "
                "cut it, or measure a file by hldm evaluate --text"
            )
        documents.append(document)
    return documents


def as_list(texts: Texts, name: str = "texts") -> list[str | bytes]:
    """One text or several as a list. Raises ValueError for anything else."""
    if isinstance(texts, str | bytes):
        return [texts]
    if not isinstance(texts, Sequence):
        raise ValueError(f"{name} must be str, bytes or a list of them, got {type(texts).__name__}")
    return list(cast(Sequence[str | bytes], texts))  # mypy keeps bytes, which went above


def score_texts(
    autoencoder: Autoencoder,
    prior: Prior | None,
    texts: Texts,
    prefix: Texts | None = None,
    *,
    draws: int = 8,
    samples: int = 0,
    seed: int = 0,
    ends_document: bool | None = None,
) -> list[Score]:
    """The bound of every text; after a prefix, of the chunks that follow it, never a difference of two bounds.

    prefix: what comes before, one for all texts or one each; its end is taken as a chunk border. '': nothing
    draws: noise levels a chunk;  samples: importance-weighted draws a chunk, 0 for none (`hldm.generation.bound`)
    seed: texts scored with one seed share the noise of chunks at one place, counted from where the text begins
    ends_document: whether the text's document ends with it, which costs bits, too; None: unless it has a prefix
    Raises ValueError, one line.
    """
    documents = as_documents(as_list(texts))
    before = _prefixes(prefix, len(documents))
    seed, samples = _whole(seed, "seed"), _whole(samples, "samples")
    draws = _whole(draws, "draws")
    if not documents:
        raise ValueError("no text given: pass at least one")
    closes = [not start if ends_document is None else ends_document for start in before]
    chunker = prompt_chunker(autoencoder)
    pieces = [part for pair in zip(before, documents, strict=True) for part in pair if part]
    chunk_start = chunker.chunk_starts([np.frombuffer(piece, np.uint8) for piece in pieces])
    corpus = make_corpus("texts", (a + b for a, b in zip(before, documents, strict=True)))
    windows = held_out_windows(autoencoder, corpus, chunk_start, closes=np.array(closes))

    # chunks first..last - 1 are a text's own; those of its prefix have places below 0
    byte = np.flatnonzero(chunk_start)
    first = np.searchsorted(byte, corpus.offsets[:-1] + [len(start) for start in before])  # (texts,)
    last = np.searchsorted(byte, corpus.offsets[1:])  # (texts,)
    place = np.arange(len(byte)) - first[np.searchsorted(corpus.offsets, byte, side="right") - 1]
    chunks = bound_chunks(
        autoencoder,
        prior,
        windows,
        draws=draws,
        samples=0 if prior is None else samples,  # the twin's likelihood needs no bound
        generator=PlacedGenerator(seed, place),
    )
    own = [slice(*span) for span in zip(first, last, strict=True)]
    return [_score(document, chunks, part, samples) for document, part in zip(documents, own, strict=True)]


def _score(document: bytes, chunks: ChunkBounds, own: slice, samples: int) -> Score:
    """The sum over a text's chunks, in bits."""
    unit = math.log(2)
    terms = {name: float(getattr(chunks, name)[own].sum()) / unit for name in ("decoder", "latent", "end")}
    _, group = np.unique(chunks.group[own], return_inverse=True)
    noise = np.bincount(group, weights=chunks.difference[own]) / 2 / unit
    bits = sum(terms.values())
    importance = importance_error = None
    if chunks.importance is not None and chunks.importance_variance is not None:
        importance = float(chunks.importance[own].sum()) / unit
        if samples > 1:
            importance_error = math.sqrt(chunks.importance_variance[own].sum()) / unit
    elif samples:  # the twin's likelihood is as tight as can be
        importance, importance_error = bits, 0.0
    return Score(
        bits,
        math.sqrt(np.square(noise).sum()),
        count_characters(document),
        **terms,
        importance=importance,
        importance_error=importance_error,
        noise=tuple(noise.tolist()),
    )


def _prefixes(prefix: Texts | None, count: int) -> list[bytes]:
    """What comes before each of `count` texts, b'' for nothing."""
    if prefix is None:
        return [b""] * count
    given = as_list(prefix, "prefix")
    if isinstance(prefix, str | bytes):
        given *= count
    if len(given) != count:
        raise ValueError(f"prefix must be one text or one for each of {count} texts, got {len(given)}")
    return [as_documents([text], "prefix")[0] if text not in ("", b"") else b"" for text in given]


def _whole(value: int, name: str) -> int:
    """The value. Raises ValueError unless it is a whole number from 0 on."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r:.40}")
    return number
