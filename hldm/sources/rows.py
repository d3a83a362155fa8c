"""Documents that are rows: of .jsonl and parquet files, and what becomes of rows that hold no text."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hldm.sources.encodings import unix_lines
from hldm.sources.notes import first_line, note, some
from hldm.text.corpus import Question

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


def read_jsonl(file: BinaryIO, path: Path, field: str, question: str = "") -> Iterator[bytes | ValueError]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        place = f"{path}:{number}"
        if len(line) == MAX_ROW_BYTES:
            raise ValueError(f"{place}: a row of more than {MAX_ROW_BYTES} bytes; .jsonl holds one a line")
        if not line.strip():
            continue
        yield row_of_json(line, field, place, question)


def row_of_json(line: bytes, field: str, place: str, question: str = "") -> bytes | ValueError:
    """The text of a row of JSON."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"{place}: not a row of JSON ({first_line(error)}); remove or mend it")
    return text_of(row, field, place, question)


def read_parquet(
    file: BinaryIO, path: Path, field: str, groups: list[int] | None = None, question: str = ""
) -> Iterator[bytes | ValueError]:
    """Rows of these row groups, or of all."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        wanted = {"field": field, "question": question} if question else {"field": field}
        for setting, name in wanted.items():
            if name not in columns:
                raise ValueError(f"{path}: no column {name!r}; set data.{setting} to one of {some(columns)}")
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[*wanted.values()], row_groups=groups):
            for values in zip(*(batch.column(name) for name in wanted.values()), strict=True):
                number += 1
                place = f"{path}:{number}"
                try:
                    row = {name: v.as_py() for name, v in zip(wanted.values(), values, strict=True)}
                except UnicodeDecodeError:
                    yield ValueError(f"{place}: column {field!r} is not UTF-8; mend it")
                else:
                    yield text_of(row, field, place, question)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({first_line(error)})") from None


def text_of(row: Any, field: str, place: str, question: str = "") -> bytes | ValueError:
    """UTF-8 of the text in a row, after that of its question if there is a column of them.

    Where there is none, a ValueError that names the place.
    """
    if not isinstance(row, dict):
        return ValueError(f"{place}: expected an object with a field {field!r}, got {type(row).__name__}")
    answer = _text_in(row, field, place, "data.field")
    if not question or isinstance(answer, ValueError):
        return answer
    if not answer.strip():
        return ValueError(f"{place}: field {field!r} is empty: a question without an answer; remove the row")
    asked = _text_in(row, question, place, "data.question")
    if isinstance(asked, ValueError):
        return asked
    return Question.with_answer(unix_lines(asked), unix_lines(answer))


def _text_in(row: dict[Any, Any], field: str, place: str, setting: str) -> bytes | ValueError:
    if field not in row:
        return ValueError(f"{place}: no field {field!r}; set {setting} to one of {some(row)}")
    if not isinstance(row[field], str):
        return ValueError(f"{place}: field {field!r} must be text, got {type(row[field]).__name__}")
    try:
        return row[field].encode()
    except UnicodeEncodeError:
        return ValueError(f"{place}: field {field!r} holds half a surrogate pair; remove it")
