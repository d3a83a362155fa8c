"""Tables for a terminal: a label a row, a value for each column, `-` where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def row(label: str, form: str, columns: Mapping[str, Any], *keys: str, scale: float = 1) -> list[str]:
    """A label and, for every column, the formatted value below these keys."""
    cells = [label]
    for value in columns.values():
        for key in keys:
            value = None if value is None else value.get(key)
        cells.append("-" if value is None else format(value * scale, form))
    return cells


def align(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width each: labels to the left, values to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for label, *values in [head, *rows]:
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
