"""Tables for a terminal: a label a row, a value for each column, `-` where there is none."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from hldm.text.bytes import printable

CELL_WIDTH = 24  # columns of a terminal that a name may take: two of them beside a label fit into 80


def row(label: str, form: str, columns: Mapping[str, Any], *keys: str, scale: float = 1) -> list[str]:
    """A label and, for every column, the formatted value below these keys."""
    cells = [label]
    for value in columns.values():
        for key in keys:
            value = None if value is None else value.get(key)
        cells.append("-" if value is None else format(value * scale, form))
    return cells


def cell(text: str) -> str:
    """A name for a table: one line, harmless, with its middle left out where it is long."""
    shown = printable(" ".join(text.split()))
    if width(shown) <= CELL_WIDTH:
        return shown
    room, begin, end = CELL_WIDTH - 1, "", ""
    while True:  # a letter from either end by turns
        letter = shown[len(begin)] if len(begin) <= len(end) else shown[-1 - len(end)]
        room -= width(letter)
        if room < 0:
            return f"{begin}…{end}"
        begin, end = (begin + letter, end) if len(begin) <= len(end) else (begin, letter + end)


def width(text: str) -> int:
    """Columns that a text takes on a terminal: two for a wide character, none for a mark."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def align(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width each: labels to the left, values to the right."""
    table = [[printable(" ".join(text.split("\n"))) for text in row] for row in [head, *rows]]
    widths = [max(width(row[column]) for row in table) for column in range(len(head))]
    lines = []
    for label, *values in table:
        cells = [" " * (most - width(value)) + value for value, most in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([label + " " * (widths[0] - width(label)), *cells]).rstrip())
    return "\n".join(lines)
