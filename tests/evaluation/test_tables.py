"""One table, two looks: Markdown that can be read as it is, and rich's on a terminal."""

from __future__ import annotations

import os
import pty
import re
import sys

import pytest

from hldm.evaluation.tables import CELL_WIDTH, Table, cell, row, short, show, width

TABLE = Table(["", "model", "twin"], [["bits", "1.25", "10.5"], ["  of it [red]latents", "-", "0"]])


def test_markdown_has_columns_of_one_width_and_every_cell_in_its_place():
    lines = str(TABLE).splitlines()
    assert len({*map(len, lines)}) == 1
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["", "model", "twin"],
        ["-" * 22, "-" * 6 + ":", "-" * 5 + ":"],
        ["bits", "1.25", "10.5"],
        ["of it [red]latents", "-", "0"],
    ]


def test_records_become_rows_and_what_they_lack_a_dash():
    columns = {"name": ("name", ""), "bits": ("bits", ".2f")}
    found = Table.of_records(
        [{"name": "one", "bits": 1.5}, {"name": "two", "bits": None}, {"name": "three"}], columns
    )
    assert found == (["name", "bits"], [["one", "1.50"], ["two", "-"], ["three", "-"]])


def test_a_row_looks_values_up_below_its_keys_in_every_column():
    columns = {"a": {"x": {"y": 0.5}}, "b": {"x": None}, "c": {}}
    assert row("label", ".1f", columns, "x", "y", scale=10) == ["label", "5.0", "-", "-"]


def test_a_pipe_gets_markdown_with_empty_lines_between(capsys):
    show("head", TABLE, "end")
    assert capsys.readouterr().out == f"head\n\n{TABLE}\n\nend\n"


def test_a_terminal_gets_a_drawn_table_with_every_cell_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    mine, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        show(TABLE)
        monkeypatch.undo()
        shown = re.sub(r"\x1b\[[0-9;]*m", "", os.read(mine, 2**16).decode())
    os.close(mine)
    assert "|" not in shown and "─" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert (
        ["model"] in lines and ["twin"] in lines and ["bits", "1.25"] in lines and ["bits", "10.5"] in lines
    )
    assert ["of", "it", "[red]latents", "0"] in lines  # no markup, nothing cut


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
    shown = short(name)
    assert width(shown) <= CELL_WIDTH and "\n" not in shown and "\x1b" not in shown and "\u202e" not in shown
    if width(name) > CELL_WIDTH and name.isascii():
        assert shown.startswith(name[:10]) and shown.endswith(name[-10:]) and "…" in shown


def test_columns_stand_below_each_other_whatever_is_in_them():
    table = Table(["", *map(short, NAMES[:2])], [["label\x1b[31m", "1", "2"], ["世界", "10", "20"]])
    lines = str(table).splitlines()
    assert len(lines) == 4 and len({width(line) for line in lines}) == 1 and width(lines[0]) <= 90
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (None, ".1f", "-"),
        (123.45, ".1f", "123.5"),
        (9_999_999.0, ".1f", "9999999.0"),
        (1.5e80, ".1f", "1.5 x 10^80"),
        (12_345_678, ",.0f", "12,345,678"),
        (0.5, ".2%", "50.00%"),
        ("a\x1bb", "", "a\\x1bb"),
    ],
)
def test_a_number_fits_itscell(value, form, shown):
    assert cell(value, form) == shown


@pytest.mark.parametrize("columns", [80, 30])
def test_a_table_wider_than_the_terminal_goes_on_below(monkeypatch, columns):
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        head = ["", *(f"measure {number}" for number in range(9))]
        show(Table(head, [[name, *(f"{number}.25" for number in range(9))] for name in ("model", "twin")]))
        text = ""
        while text.count("8.25") < 2:
            text += os.read(ours, 65536).decode()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(map(len, plain)) <= columns
    assert all(sum(word in line for line in plain) == 1 for word in head[1:])
    assert sum("twin" in line for line in plain) == {80: 2, 30: 9}[columns]
