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


class Question(bytes):
    """A document that begins with a question: its first `question_bytes` are read, the rest is the answer."""

    question_bytes: int = 0

    @classmethod
    def with_answer(cls, question: bytes, answer: bytes) -> Question:
        """The two in a row, a line end between them, which counts as the question's."""
        return cls(question + b"\n" + answer).up_to(len(question) + 1)

    def up_to(self, question_bytes: int) -> Question:
        """The same, so many bytes of it the question."""
        self.question_bytes = question_bytes
        return self


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents of one split, in their own order."""

    name: str
    text: np.ndarray  # uint8, all documents joined
    offsets: np.ndarray  # int64, documents + 1; document i is text[offsets[i] : offsets[i + 1]]
    question_bytes: np.ndarray | None = None  # int64 (documents,) length of the question each begins with
    split: Split | None = None  # of the text that it was read as; None: a text by itself

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.document, range(len(self)))

    def document(self, index: int) -> np.ndarray:
        """Bytes (t,) uint8 of one document."""
        return self.text[self.offsets[index] : self.offsets[index + 1]]

    def beginning(self, index: int, size: int | None = None) -> bytes:
        """The first bytes of a document, all when None, as `make_corpus` takes them: a question stays one."""
        text = self.document(index)[:size].tobytes()
        if self.question_bytes is None:
            return text
        return Question(text).up_to(min(int(self.question_bytes[index]), len(text)))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of text and offsets, in hex: equal exactly when the documents are."""
        digest = hashlib.sha256(self.offsets.astype("<i8").tobytes())
        digest.update(self.text.data)
        if self.question_bytes is not None:
            digest.update(self.question_bytes.astype("<i8").tobytes())
        return digest.hexdigest()


def make_corpus(name: str, documents: Iterable[bytes], split: Split | None = None) -> Corpus:
    """Join documents into a corpus; empty ones, which hold nothing to read, are left out."""
    text, offsets, questions = bytearray(), [0], []
    for document in documents:
        if document:
            text += document
            offsets.append(len(text))
            questions.append(document.question_bytes if isinstance(document, Question) else 0)
    joined = np.frombuffer(text, np.uint8)
    joined.flags.writeable = False
    question_bytes = np.array(questions, np.int64) if any(questions) else None
    return Corpus(name, joined, np.array(offsets, np.int64), question_bytes, split)
