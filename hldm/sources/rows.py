"""Documents that are rows: of .jsonl and parquet files, and what becomes of rows that hold no text."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hldm.sources.notes import first_line, note, some

MAX_ROW_BYTES = 16 * 2**20  # a longer line is no row of a .jsonl file; parsed it may take 40 times as much
MAX_BAD_ROWS = 1e-3  # share of the rows that may be left out
FIRST_ROWS = 1000  # all of them bad: the field is wrong, and a billion more rows are not worth reading


def good_rows(rows: Iterator[bytes | ValueError], source: str) -> Generator[bytes, None, None]:
    """Texts of rows; bad ones, up to MAX_BAD_ROWS of all that were read, are left out, counted and said.

    The rows are judged when no more is read, so that it does not matter where among them a bad one stands.
    Raises ValueError, the first bad row's, where they are more; when closed, too.
    """
    bad, number = 0, 0
    first: ValueError | None = None

    def judge() -> None:
        if bad > MAX_BAD_ROWS * number:
            raise ValueError(f"{first} (bad rows: {bad:,} of the first {number:,})") from None
        if bad:
            note(f"{source}: left out {bad:,} bad of {number:,} rows; the first: {first}")

    try:
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, ValueError):
                yield row
                continue
            bad += 1
            first = first or row
            if bad == number == FIRST_ROWS:
                break
    except GeneratorExit:  # enough was read
        judge()
        raise
    judge()


def read_jsonl(file: BinaryIO, path: Path, field: str) -> Iterator[bytes | ValueError]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        place = f"{path}:{number}"
        if len(line) == MAX_ROW_BYTES:
            raise ValueError(f"{place}: a row of more than {MAX_ROW_BYTES} bytes; .jsonl holds one a line")
        if not line.strip():
            continue
        yield row_of_json(line, field, place)


def row_of_json(line: bytes, field: str, place: str) -> bytes | ValueError:
    """The text of a row of JSON."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"{place}: not a row of JSON ({first_line(error)}); remove or mend it")
    return text_of(row, field, place)


def read_parquet(
    file: BinaryIO, path: Path, field: str, groups: list[int] | None = None
) -> Iterator[bytes | ValueError]:
    """Rows of these row groups, or of all."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        if field not in columns:
            raise ValueError(f"{path}: no column {field!r}; set data.field to one of {some(columns)}")
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[field], row_groups=groups):
            for value in batch.column(0):
                number += 1
                place = f"{path}:{number}"
                try:
                    row = {field: value.as_py()}
                except UnicodeDecodeError:
                    yield ValueError(f"{place}: column {field!r} is not UTF-8; mend it")
                else:
                    yield text_of(row, field, place)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({first_line(error)})") from None


def text_of(row: Any, field: str, place: str) -> bytes | ValueError:
    """UTF-8 of the text in a row; where there is none, a ValueError that names the place."""
    if not isinstance(row, dict):
        return ValueError(f"{place}: expected an object with a field {field!r}, got {type(row).__name__}")
    if field not in row:
        return ValueError(f"{place}: no field {field!r}; set data.field to one of {some(row)}")
    if not isinstance(row[field], str):
        return ValueError(f"{place}: field {field!r} must be text, got {type(row[field]).__name__}")
    try:
        return row[field].encode()
    except UnicodeEncodeError:
        return ValueError(f"{place}: field {field!r} holds half a surrogate pair; remove it")
