"""A source of text in shards, each of which can be entered at any of its places: what streaming reads.

A shard is a stretch of a plain text or .jsonl file, a row group of a parquet file, a part of a dataset, or a whole file
that can only be read from its start (.gz, UTF-16). Where there are fewer of those than readers, each reader passes over
all their rows and keeps its own. A place is a number: a byte of the file, or how many rows came before. Rows are as
`hldm.sources.rows` has them: text, or a ValueError for one that holds none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hldm.config import DataConfig
from hldm.sources.encodings import (
    GZIP,
    damage_named,
    is_read_from_its_start,
    line_border,
    open_packed,
    open_text,
    require_utf8,
    unix_lines,
)
from hldm.sources.files import format_of, matching_files, typed_bytes
from hldm.sources.hub import dataset_parts
from hldm.sources.notes import first_line
from hldm.sources.rows import MAX_ROW_BYTES, read_jsonl, read_parquet, row_of_json

Rows = Iterator[tuple[int, bytes | ValueError]]  # the place after each row, and the row

DOCUMENT_BYTES = 2**18  # a longer document is read in pieces of about so many, each a document of its own
LEAST_SHARD, MOST_SHARD = 2**10, 2**23  # bytes of a file
SHARDS_A_READER = 8  # of files, at least, where they are long enough: an epoch orders them anew
NEAR = 1000  # bytes within which the end of a line is sought
BLOCK = 2**20


class Shard(NamedTuple):
    """A part of a source that is read in order."""

    name: str
    begin: int  # the place where it starts
    rows: Callable[[int], Rows]  # from a place on


class Source(NamedTuple):
    """Everything that is streamed, in its own order."""

    name: str
    shards: list[Shard]
    fingerprint: str  # changes when the file does: its size and its beginning


def open_source(config: DataConfig) -> Source:
    """The shards of data.path or data.dataset for data.readers. Raises ConfigError, FileNotFoundError, ValueError."""
    if config.path:
        return _files(config)
    places, open_part, fingerprint = dataset_parts(config)
    shards = [Shard(name, 0, partial(open_part, index)) for index, name in enumerate(places)]
    return Source(config.dataset, _shared(shards, config.readers), fingerprint)


def _shared(shards: list[Shard], readers: int) -> list[Shard]:
    """Shards that are entered by rows, each in as many parts as there are readers where they are too few."""
    if len(shards) >= readers:
        return shards
    return [
        Shard(f"{shard.name}, part {part + 1} of {readers}", 0, partial(_every, shard, part, readers))
        for shard in shards
        for part in range(readers)
    ]


def _every(shard: Shard, part: int, parts: int, place: int) -> Rows:
    """Rows part, part + parts, ... of a shard that is entered by rows."""
    for after, row in shard.rows(place):
        if (after - 1) % parts == part:
            yield after, row


# ---- files


def _files(config: DataConfig) -> Source:
    files = matching_files(config.path)
    heads = [_head(path) for path in files]
    digest = hashlib.sha256()
    for path, head in zip(files, heads, strict=True):
        digest.update(b"%d %s" % (path.stat().st_size, hashlib.sha256(head).digest()))
    is_plain = [
        format_of(p) != ".parquet" and not is_read_from_its_start(h)
        for p, h in zip(files, heads, strict=True)
    ]
    total = sum(path.stat().st_size for path, plain in zip(files, is_plain, strict=True) if plain)
    size = min(max(total // (SHARDS_A_READER * config.readers), LEAST_SHARD), MOST_SHARD)
    shards: list[Shard] = []
    by_rows: list[Shard] = []
    for path, head, plain in zip(files, heads, is_plain, strict=True):
        if plain:
            shards += _stretches(path, head, config, size)
        else:
            by_rows += _by_rows(path, head, config)
    return Source(config.path, [*shards, *_shared(by_rows, config.readers)], digest.hexdigest())


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2**16)


def _stretches(path: Path, head: bytes, config: DataConfig, size: int) -> Iterator[Shard]:
    """Stretches of a plain file, each with the rows that start in it."""
    with path.open("rb") as file, damage_named(str(path)):
        open_text(file, str(path))  # says what it holds if not text
        begin = file.tell()  # after a byte-order mark
    is_jsonl = format_of(path) == ".jsonl"
    delimiter = b"\n" if is_jsonl else typed_bytes(config.separator)
    if not is_jsonl and b"\r\n" in head:
        delimiter = delimiter.replace(b"\n", b"\r\n")
    elif not is_jsonl and b"\n" not in head and b"\r" in head:
        delimiter = delimiter.replace(b"\n", b"\r")
    if not delimiter:  # so that documents do not depend on how long the stretches are
        size = -(-size // DOCUMENT_BYTES) * DOCUMENT_BYTES
    end = path.stat().st_size
    for first in range(begin, end, size):
        last = min(first + size, end)
        beyond = last + 4 * (last == end)  # so that the last stretch ends with the file
        rows = partial(
            _rows_between, path, first, beyond, begin, delimiter, config.field if is_jsonl else None
        )
        yield Shard(f"{path}, bytes {first:,} to {last:,}", first, rows)


def _rows_between(
    path: Path, first: int, last: int, begin: int, delimiter: bytes, field: str | None, place: int
) -> Rows:
    """Rows that start in bytes first..last of a file whose text begins at `begin`, from a place on.

    field: of rows of JSON; None: rows are text
    """
    with path.open("rb") as file:
        start: int | None = place
        if place == first > begin:
            start = _first_start(file, first, last, begin, delimiter)
        if start is None:
            return
        most = DOCUMENT_BYTES if field is None else MAX_ROW_BYTES
        for at, after, text in _records(file, start, last, begin, delimiter, most):
            row = (
                _as_text(text, f"{path}, byte {at:,}")
                if field is None
                else _as_row(text, f"{path}, byte {at:,}", field)
            )
            if row is not None:
                yield after, row


def _first_start(file: BinaryIO, first: int, last: int, begin: int, delimiter: bytes) -> int | None:
    """Where the first row starts that starts in first..last; None where none does."""
    if not delimiter:
        back = min(first, 3)  # of a character that `first` lies in
        file.seek(first - back)
        return first - back + line_border(file.read(back + NEAR), back)
    # Of delimiters that overlap, such as those in three line ends, the first counts: go back to where none does.
    at, size = max(first - len(delimiter), begin), len(delimiter)
    while True:
        file.seek(max(at - size + 1, begin))
        back = file.read(at - file.tell() + size - 1).find(delimiter)
        if back < 0:
            break
        at = max(at - size + 1, begin) + back
    file.seek(at)
    text = b""
    while at < last:
        found = text.find(delimiter)
        if found >= 0:
            at, text = at + found + size, text[found + size :]
            if at >= first:
                return at if at < last else None
        elif block := file.read(BLOCK):
            kept = text[-(size - 1) :] if size > 1 else b""
            at, text = at + len(text) - len(kept), kept + block
        else:
            return None
    return None


def _records(
    file: BinaryIO, at: int, end: int | None, begin: int, delimiter: bytes, most: int
) -> Iterator[tuple[int, int, bytes]]:
    """Where each record starts, where the next one may, and its text; those that start before `end`, whole.

    One longer than `most` comes in pieces. Without a delimiter all are such pieces, on a grid that starts at `begin`.
    """
    is_start = True
    if end is not None:  # else it cannot be wound back, and starts where it is
        file.seek(max(at - len(delimiter), 0))
        before = file.read(at - file.tell())
        is_start = at == begin or not delimiter or before == delimiter
    buffer, used, is_over = b"", 0, False
    room = most + NEAR + max(len(delimiter), 4)
    early = (
        0 if delimiter else 3
    )  # what begins so little before the end is the first piece of the next stretch
    while end is None or at < end - early or not is_start:
        found = buffer.find(delimiter, used, used + room) if delimiter else -1
        if found < 0 and not is_over and len(buffer) - used < room:
            block = file.read(BLOCK)
            is_over = not block
            buffer, used = buffer[used:] + block, 0
            continue
        if used == len(buffer):
            return
        stop, is_start = found, found >= 0
        if found < 0:
            # 4: a piece may start up to 3 bytes before its place on the grid, not to split a character
            limit = most if delimiter else most - (at + 4 - begin) % most + 4
            rest = len(buffer) - used
            stop = used + (
                rest if rest <= limit else max(line_border(buffer[used : used + limit + NEAR], limit), 1)
            )
            is_start = not delimiter
        text = buffer[used:stop]
        after = stop + (len(delimiter) if found >= 0 else 0)
        yield at, at + after - used, text
        at, used = at + after - used, after


def _as_text(text: bytes, place: str) -> bytes | ValueError | None:
    """A document; None for an empty one."""
    try:
        require_utf8(text, place)
    except ValueError as error:
        return error
    return unix_lines(text) or None


def _as_row(line: bytes, place: str, field: str) -> bytes | ValueError | None:
    if len(line) >= MAX_ROW_BYTES:
        raise ValueError(f"{place}: a row of more than {MAX_ROW_BYTES} bytes; .jsonl holds one a line")
    return row_of_json(line, field, place) if line.strip() else None


def _by_rows(path: Path, head: bytes, config: DataConfig) -> Iterator[Shard]:
    """Shards that are entered by the number of a row: row groups, or a file that is read from its start."""
    if format_of(path) == ".parquet" and not head.startswith(GZIP):
        groups = _row_groups(path)
        for group in range(groups):
            yield Shard(f"{path}, row group {group}", 0, partial(_from_start, path, config, group))
    else:
        yield Shard(str(path), 0, partial(_from_start, path, config, None))


def _row_groups(path: Path) -> int:
    import pyarrow
    from pyarrow import parquet

    try:
        return int(parquet.ParquetFile(path).num_row_groups)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({first_line(error)})") from None


def _from_start(path: Path, config: DataConfig, group: int | None, place: int) -> Rows:
    rows = _rows_of(path, config, group)
    with closing(rows):
        yield from islice(enumerate(rows, start=1), place, None)


def _rows_of(path: Path, config: DataConfig, group: int | None) -> Any:
    """Rows of a row group, or of a file from its start."""
    name = str(path)
    with path.open("rb") as packed, damage_named(name):
        if format_of(path) == ".parquet":
            groups = None if group is None else [group]
            yield from read_parquet(open_packed(packed, name), path, config.field, groups)
            return
        file = open_text(packed, name)
        if format_of(path) == ".jsonl":
            yield from read_jsonl(file, path, config.field)
            return
        separator = typed_bytes(config.separator)
        for at, _, text in _records(file, 0, None, 0, separator, DOCUMENT_BYTES):
            row = _as_text(text, f"{name}, unpacked byte {at:,}")
            if row is not None:
                yield row
