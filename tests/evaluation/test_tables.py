"""Whatever a run or a file is called, a table stays one: aligned, harmless, and within a terminal."""

from __future__ import annotations

import pytest

from hldm.evaluation.evaluate import _cell
from hldm.evaluation.tables import CELL_WIDTH, align, cell, width

NAMES = [
    "short",
    "a/very/long/path/" * 9 + "text.txt",
    "世界" * 30,
    "e\u0301" * 60,
    "\x1b[2J\n\x9b\u202eab\t",
    "👩" * 40,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_is_short_and_harmless(name):
    shown = cell(name)
    assert width(shown) <= CELL_WIDTH and "\n" not in shown and "\x1b" not in shown and "\u202e" not in shown
    if width(name) > CELL_WIDTH and name.isascii():
        assert shown.startswith(name[:10]) and shown.endswith(name[-10:]) and "…" in shown


def test_columns_stand_below_each_other_whatever_is_in_them():
    lines = align(
        ["", *map(cell, NAMES[:2])], [["label\x1b[31m", "1", "2"], ["世界", "10", "20"]]
    ).splitlines()
    assert len(lines) == 3 and len({width(line) for line in lines}) == 1 and width(lines[0]) <= 80
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (None, ".1f", "-"),
        (123.45, ".1f", "123.5"),
        (9_999_999.0, ".1f", "9999999.0"),
        (1.5e80, ".1f", "1.500e+80"),
        (12_345_678, ",.0f", "12,345,678"),
        (0.5, ".2%", "50.00%"),
        ("a\x1bb", "", "a\\x1bb"),
    ],
)
def test_a_number_fits_its_cell(value, form, shown):
    assert _cell(value, form) == shown
