"""Text that is read while a model trains on it, in bounded memory: `data.stream: true`.

    shards, dealt to data.readers readers ── documents, without those held out ── shuffled, SHUFFLE_BYTES at a
    time ── taken by the reader's streams, by each that runs out (hldm.training.stream)

- A reader has a share of the shards for good (a permutation by the seed), and passes over it again and again, each time
  in another order: no two readers read the same text, and none reads anything twice before it has read all of its own.
- Where a reader is, is a few numbers: the block of documents it has shuffled begins at a place of a shard, and so many
  of the block are taken. From there it goes on exactly.
- Which documents are held out depends on what they say alone, so copies of a document fall on one side. Validation and
  test text are those of the first HEAD_BYTES; the others of their kind are left out of training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from hldm.config import ConfigError, DataConfig
from hldm.sources.encodings import is_blank, line_border, unix_lines
from hldm.sources.notes import note
from hldm.sources.rows import MAX_BAD_ROWS
from hldm.sources.shards import DOCUMENT_BYTES, NEAR, Source, open_source
from hldm.text.corpus import SPLITS, Corpus, Split, make_corpus

SHUFFLE_BYTES = 2**24  # of documents, that each reader shuffles at a time: thousands of pages
HEAD_BYTES = 2**24  # of text, at the beginning of a source, that is looked at before training


def split_of(document: bytes, held_out: float) -> Split:
    """The split of a document: a function of its text alone."""
    share = int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little") / 2**64
    return "validation" if share < held_out else "test" if share < 2 * held_out else "train"


def pieces_of(row: bytes) -> Iterator[bytes]:
    """A row as a document, LF at the end of every line, or as several where it is longer than DOCUMENT_BYTES."""
    row, begin = unix_lines(row), 0
    while len(row) - begin > DOCUMENT_BYTES + NEAR:
        end = begin + line_border(row[begin : begin + DOCUMENT_BYTES + NEAR], DOCUMENT_BYTES)
        yield row[begin:end]
        begin = end
    if begin < len(row):
        yield row[begin:]


def head_corpora(config: DataConfig) -> dict[Split, Corpus]:
    """The splits of a source's first HEAD_BYTES: what is held out, and a sample of what is trained on.

    Raises ConfigError where that leaves a split empty.
    """
    source = open_source(config)
    limit = min(HEAD_BYTES, config.max_bytes)
    parts: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
    size, bad, rows = 0, 0, 0
    for _, row in chain.from_iterable(shard.rows(shard.begin) for shard in source.shards):
        rows += 1
        if isinstance(row, ValueError):
            if rows == 1:  # hardly the only one: the field is wrong, say
                raise row
            bad = _count_bad(source.name, row, bad, rows)
            continue
        for document in pieces_of(row):
            parts[split_of(document, config.held_out)].append(document)
            size += len(document)
        if size >= limit:
            break
    empty = [split for split in SPLITS if not parts[split]]
    if not size or all(is_blank(document) for document in chain.from_iterable(parts.values())):
        raise ConfigError(
            f"{source.name} holds no text: every document is empty or white space; choose another"
        )
    if empty:
        raise ConfigError(
            f"{source.name}: {sum(map(len, parts.values())):,} documents in {size:,} bytes leave nothing for "
            f"{empty[0]} at data.held_out={config.held_out}: raise it, set data.separator, or read all of it "
            "(data.stream=false)"
        )
    return {split: make_corpus(f"the {split} text of {source.name}", parts[split], split) for split in SPLITS}


def _count_bad(name: str, error: ValueError, bad: int, rows: int) -> int:
    """One bad row more, the first of which is said. Raises where they are too many."""
    if bad + 1 > 1 + MAX_BAD_ROWS * rows:
        raise ValueError(f"{error} (bad rows: {bad + 1:,} of the first {rows:,})")
    if not bad:
        note(
            f"{name}: left out a bad row: {error}; others, up to one in {1 / MAX_BAD_ROWS:,.0f}, are left out unsaid"
        )
    return bad + 1


class Cursor(NamedTuple):
    """Where a reader is."""

    epoch: int = 0  # passes over its shards before this one
    shard: int = 0  # of those of this pass, where the shuffled block begins ...
    place: int = -1  # ... and at which place; -1: at the shard's begin
    block: int = 0  # number of the block
    taken: int = 0  # documents of the block that are taken
    rows: int = 0  # read before the block, ...
    bad: int = 0  # ... and how many of them were bad
    found: int = 0  # documents of this pass before the block


class Reader:
    """The documents of one of data.readers shares of a source, without end."""

    def __init__(self, source: Source, config: DataConfig, *, index: int, seed: int) -> None:
        """Raises ConfigError where there are fewer shards than readers."""
        self.source, self.config, self.index, self.seed = source, config, index, seed
        dealt = np.random.default_rng([seed, 0]).permutation(len(source.shards))
        self.shards = [source.shards[at] for at in dealt[index :: config.readers]]
        if not self.shards:
            raise ConfigError(
                f"{source.name} comes in {len(source.shards)} parts, too few for data.readers={config.readers}: "
                "lower it"
            )
        self.seek(Cursor())

    def seek(self, cursor: Cursor) -> None:
        """Go to where a reader of the same share was."""
        self._begin = self._end = cursor._replace(taken=0)  # of the block, and of what is read
        self._rows: Iterator[tuple[int, bytes | ValueError]] | None = None
        self._documents: list[bytes] = []  # of the block, the next one last
        self.cursor = cursor
        if cursor.taken:
            self._load()
            del self._documents[len(self._documents) - cursor.taken :]
            self.cursor = self._begin._replace(taken=cursor.taken)

    def next_document(self) -> bytes:
        """The next document, not empty. Raises ValueError or OSError where it cannot be read."""
        if not self._documents:
            self._load()
        self.cursor = self._begin._replace(taken=self.cursor.taken + 1)
        return self._documents.pop()

    def _load(self) -> None:
        """Read and shuffle a block."""
        self._begin = self._end
        self.cursor = self._begin
        order = np.random.default_rng([self.seed, 1, self.index, self._begin.epoch]).permutation(
            len(self.shards)
        )
        documents: list[bytes] = []
        size = 0
        at = self._begin
        while size < SHUFFLE_BYTES:
            if self._rows is None:
                shard = self.shards[order[at.shard]]
                self._rows = shard.rows(shard.begin if at.place < 0 else at.place)
            found = next(self._rows, None)
            if found is None:
                self._rows = None
                at = at._replace(shard=at.shard + 1, place=-1)
                if at.shard < len(self.shards):
                    continue
                if not at.found:
                    raise ValueError(
                        f"{self.source.name}: reader {self.index + 1} of {self.config.readers} found no training text "
                        f"in all of its {len(self.shards)} parts: lower data.readers, or see data.separator and "
                        "data.field"
                    )
                at = at._replace(epoch=at.epoch + 1, shard=0, found=0)
                break  # a block lies in one pass
            place, row = found
            at = at._replace(place=place, rows=at.rows + 1)
            if isinstance(row, ValueError):
                at = at._replace(bad=_count_bad(self.source.name, row, at.bad, at.rows))
                continue
            kept = [d for d in pieces_of(row) if split_of(d, self.config.held_out) == "train"]
            documents += kept
            size += sum(map(len, kept))
            at = at._replace(found=at.found + len(kept))
        self._end = at._replace(block=at.block + 1)
        mixed = np.random.default_rng([self.seed, 2, self.index, self._begin.block]).permutation(
            len(documents)
        )
        self._documents = [documents[i] for i in mixed]
        if not documents:  # a pass that ended where the block before it did
            self._load()
