"""What a fault module is given and what it reports."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class Skipped(Exception):
    """This machine cannot inject the fault; the message says why."""


class Trial:
    """One fault's share of the work, its random numbers, its folder and its figures."""

    def __init__(self, fault: str, scale: float, seed: int, folder: Path):
        """scale: share of the full number of injections; folder: empty, for the trial alone."""
        self.fault, self.scale, self.folder = fault, scale, folder
        self.draw = random.Random(f"{fault} {seed}")
        self.seed = seed
        self.tried = 0
        self.bad: list[str] = []  # one line for each injection that broke a promise
        self.note = ""  # further figures

    def count(self, whole: int) -> int:
        """How many injections to make where the full suite makes `whole`."""
        return max(1, round(whole * self.scale))

    def sample(self, points: Sequence[T]) -> list[T]:
        """All points at scale 1, else a random share of them, in order."""
        if self.scale >= 1:
            return list(points)
        return [points[i] for i in sorted(self.draw.sample(range(len(points)), self.count(len(points))))]

    def record(self, injection: str, wrong: Iterable[str]) -> bool:
        """Count an injection; `wrong` says what it broke, if anything. Returns whether all was well."""
        found = list(wrong)
        self.tried += 1
        if found:
            self.bad.append(f"{injection}: {'; '.join(found)}")
        return not found
