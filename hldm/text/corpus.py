"""Documents of one split, joined: what is read is in hldm.sources."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents of one split, in their own order."""

    name: str
    text: np.ndarray  # uint8, all documents joined
    offsets: np.ndarray  # int64, documents + 1; document i is text[offsets[i] : offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.document, range(len(self)))

    def document(self, index: int) -> np.ndarray:
        """Bytes (t,) uint8 of one document."""
        return self.text[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of text and offsets, in hex: equal exactly when the documents are."""
        digest = hashlib.sha256(self.offsets.astype("<i8").tobytes())
        digest.update(self.text.data)
        return digest.hexdigest()


def make_corpus(name: str, documents: Iterable[bytes]) -> Corpus:
    """Join documents into a corpus; empty ones, which hold nothing to read, are left out."""
    text, offsets = bytearray(), [0]
    for document in documents:
        if document:
            text += document
            offsets.append(len(text))
    joined = np.frombuffer(text, np.uint8)
    joined.flags.writeable = False
    return Corpus(name, joined, np.array(offsets, np.int64))
