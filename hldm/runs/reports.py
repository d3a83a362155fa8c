"""JSON that a command writes where its user says: never over what is not a report of the same kind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hldm.runs.files import atomic_write

MAX_REPORT_BYTES = 10_000_000
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins


def check_report_path(path: Path, key: str) -> None:
    """Raise ValueError or OSError, one line, unless a report may be written to this path.

    key: stands at the top of every report of this kind; a file that has it may be replaced
    """
    place = f"--json {path}"
    _check_place(path, place)
    if path.exists():
        try:
            with path.open("rb") as file:
                is_ours = key in json.loads(file.read(MAX_REPORT_BYTES))
        except (ValueError, RecursionError, TypeError):
            is_ours = False
        _require_ours(is_ours, f"{place} is there and is no report of this kind")


def check_picture_path(path: Path) -> None:
    """The same for a picture, which may replace another PNG."""
    place = f"--png {path}"
    _check_place(path, place)
    if path.exists():
        with path.open("rb") as file:
            _require_ours(file.read(8) == PNG, f"{place} is there and is no picture")


def check_page_path(path: Path, mark: bytes) -> None:
    """The same for a page, which may replace another that begins with this mark."""
    place = f"--html {path}"
    _check_place(path, place)
    if path.exists():
        with path.open("rb") as file:
            _require_ours(file.read(len(mark)) == mark, f"{place} is there and is no page of this kind")


def _check_place(path: Path, place: str) -> None:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{place}: no folder {folder} to write it to")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise ValueError(f"{place} is not a regular file: choose another name")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{place}: {folder} cannot be written to")


def _require_ours(is_ours: bool, message: str) -> None:
    if not is_ours:
        raise ValueError(f"{message}: delete it or choose another name")


def save_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, whole or not at all."""
    atomic_write(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
