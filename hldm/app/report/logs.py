"""What a run wrote while it trained: curves, events, and what went wrong. Reads files only; knows no model.

A run that is still training may be in the middle of a line: what cannot be read is counted, not repaired.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hldm.runs.folder import SAMPLE_HEADER

STAGES = ("autoencoder", "prior")
AXES = ("seconds", "characters", "step")  # what a curve can be drawn against
MAX_LOG_BYTES = 200_000_000  # some 500,000 lines


class StageLog(NamedTuple):
    """One stage's folder: its metrics by key, and what else was noted."""

    stage: str
    rows: list[dict[str, float]]  # numbers of each line, finite ones only
    notes: list[str]  # a line each
    sample: str  # the last one of samples.txt
    is_finished: bool

    def curve(self, key: str, axis: str) -> list[tuple[float, float]]:
        """(x, y) of every line that has both."""
        return [(row[axis], row[key]) for row in self.rows if axis in row and key in row]


def read_logs(folder: Path) -> list[StageLog]:
    """The stages that a run has, in order. Raises OSError for what cannot be opened."""
    return [read_stage(folder / stage) for stage in STAGES if (folder / stage).is_dir()]


def read_stage(folder: Path) -> StageLog:
    """One stage."""
    rows, notes = _read_metrics(folder / "metrics.jsonl")
    is_finished = (folder / "totals.json").is_file()
    if not is_finished:
        notes.append("this stage is not finished: it is still training, or was stopped")
    post_mortem = folder / "post-mortem.json"
    if post_mortem.is_file():
        try:
            found = json.loads(post_mortem.read_bytes())
            notes.append(f"training ended at step {found['step']}: {found['reason']}")
        except (ValueError, LookupError, TypeError, RecursionError):
            notes.append("post-mortem.json cannot be read")
    return StageLog(folder.name, rows, notes, _last_sample(folder / "samples.txt"), is_finished)


def _read_metrics(path: Path) -> tuple[list[dict[str, float]], list[str]]:
    """Numbers of each line, and notes on events and on lines that are no numbers."""
    if not path.is_file():
        return [], ["no metrics.jsonl: this run was exported, or has logged nothing yet"]
    rows: list[dict[str, float]] = []
    held_out: list[dict[str, float]] = []  # validations, which say no more than their step
    events: dict[str, list[int]] = {}
    odd: Counter[str] = Counter()  # keys by how often their value is no finite number
    torn = 0
    with path.open("rb") as file:
        for line in file.read(MAX_LOG_BYTES).splitlines():
            found = _parse(line)
            if found is None:
                torn += 1
            elif found.get("event") == "validation":
                held_out.append(_numbers(found))
            elif "event" in found:
                events.setdefault(str(found["event"]), []).append(int(found["step"]))
            else:
                rows.append(_numbers(found))
                odd.update(key for key, value in found.items() if value is not None and not _is_number(value))
    notes = [_about(event, steps) for event, steps in events.items()]
    notes += [f"{key} is not finite in {count:,} of {len(rows):,} lines" for key, count in odd.items()]
    if torn:
        notes.append(f"{torn:,} lines of metrics.jsonl cannot be read and are left out")
    if path.stat().st_size > MAX_LOG_BYTES:
        notes.append(f"metrics.jsonl is read up to {MAX_LOG_BYTES:,} bytes")
    return rows + [_dated(found, rows) for found in held_out], notes


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """Those values that are finite numbers."""
    return {key: value for key, value in found.items() if _is_number(value)}


def _dated(found: dict[str, float], rows: list[dict[str, float]]) -> dict[str, float]:
    """A validation with the seconds and characters of its step, between those of the lines around it."""
    dated = dict(found)
    for axis in ("seconds", "characters"):
        known = [(row["step"], row[axis]) for row in rows if axis in row]
        if known:
            steps, values = zip(*known, strict=True)
            dated[axis] = float(np.interp(found["step"], (0, *steps), (0, *values)))
    return dated


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line of metrics; None where it is no object with a whole step."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and type(found.get("step")) is int else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _about(event: str, steps: list[int]) -> str:
    """One line on an event that came at these steps."""
    event = "gradient norm that stands out" if event == "gradient spike" else event
    if len(steps) == 1:
        return f"step {steps[0]:,}: {event}"
    return f"{event}: {len(steps):,} times, from step {min(steps):,} to {max(steps):,}"


def _last_sample(path: Path) -> str:
    """The text below the last header of samples.txt; '' where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        data = file.read(MAX_LOG_BYTES)
    heads = list(SAMPLE_HEADER.finditer(data))
    return data[heads[-1].end() :].decode("utf-8", "replace").strip() if heads else ""
