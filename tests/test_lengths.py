"""A screen long: no function over 80 lines, no file over 400, in hldm/ and tests/."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT

MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_FILE = 80, 400
FILES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("hldm", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def too_long(source: str) -> list[str]:
    """What of a file is longer than it may be."""
    lines = len(source.splitlines())
    found = [f"the file: {lines} lines"] if lines > MOST_LINES_OF_A_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node, *node.decorator_list], key=lambda part: part.lineno).lineno
            lines = (node.end_lineno or first) - first + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                found.append(f"{node.name}: {lines} lines")
    return found


@pytest.mark.parametrize("name", FILES)
def test_functions_and_files_fit_a_screen(name):
    assert not too_long(FILES[name])


def test_what_is_too_long_is_found():
    body = "    x = 1\n"
    assert too_long("def short():\n" + 79 * body) == []
    assert too_long("def long():\n" + 80 * body) == ["long: 81 lines"]
    assert too_long("@cached\ndef long():\n" + 79 * body) == ["long: 81 lines"]
    assert too_long("class A:\n    async def long(self):\n" + 80 * ("    " + body)) == ["long: 81 lines"]
    assert too_long(401 * "x = 1\n") == ["the file: 401 lines"]
