"""JSON that a command writes where its user says: never over what is not a report of the same kind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hldm.runs.files import atomic_write

MAX_REPORT_BYTES = 10_000_000
# Kinds of pictures by the ending of their names, and how such a file begins.
PICTURES = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF-"}


def check_report_path(path: Path, key: str) -> None:
    """Raise ValueError or OSError, one line, unless a report may be written to this path.

    key: stands at the top of every report of this kind; a file that has it may be replaced
    """

    def is_report(data: bytes) -> bool:
        try:
            return key in json.loads(data)
        except (ValueError, RecursionError, TypeError):
            return False

    _check(path, "--json", "report of this kind", is_report)


def picture_kind(path: Path) -> str:
    """png, svg or pdf, by a file's ending. Raises ValueError for any other."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in PICTURES:
        raise ValueError(f"{path} must end in .{', .'.join(PICTURES)}: that says what picture it becomes")
    return kind


def check_picture_path(path: Path, option: str = "--figure") -> None:
    """The same for a picture, by its ending PNG, SVG or PDF, which may replace another of its kind."""
    begin = PICTURES[picture_kind(path)]
    _check(path, option, f"{path.suffix} picture", lambda data: data.startswith(begin))


def check_page_path(path: Path, mark: bytes) -> None:
    """The same for a page, which may replace another that begins with this mark."""
    _check(path, "--html", "page of this kind", lambda data: data.startswith(mark))


def _check(path: Path, option: str, kind: str, is_ours: Callable[[bytes], bool]) -> None:
    place, folder = f"{option} {path}", path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{place}: no folder {folder} to write it to")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise ValueError(f"{place} is not a regular file: choose another name")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{place}: {folder} cannot be written to")
    if path.exists():
        with path.open("rb") as file:
            data = file.read(MAX_REPORT_BYTES)
        if not is_ours(data):
            raise ValueError(f"{place} is there and is no {kind}: delete it or choose another name")


def save_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, whole or not at all."""
    atomic_write(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
