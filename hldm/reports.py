"""JSON that a command writes where its user says: never over what is not a report of the same kind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hldm.checkpoints import atomic_write

MAX_REPORT_BYTES = 10_000_000


def check_report_path(path: Path, key: str) -> None:
    """Raise ValueError or OSError, one line, unless a report may be written to this path.

    key: stands at the top of every report of this kind; a file that has it may be replaced
    """
    place = f"--json {path}"
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{place}: no folder {folder} to write it to")
    if os.path.lexists(path):
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{place} is not a regular file: choose another name")
        try:
            with path.open("rb") as file:
                is_ours = key in json.loads(file.read(MAX_REPORT_BYTES))
        except (ValueError, RecursionError, TypeError):
            is_ours = False
        if not is_ours:
            raise ValueError(
                f"{place} is there and is no report of this kind: delete it or choose another name"
            )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{place}: {folder} cannot be written to")


def save_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, whole or not at all."""
    atomic_write(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
