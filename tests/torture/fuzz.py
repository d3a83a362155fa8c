"""Fuzzed texts, prompts, configs and files: read or refused in one line (tests/fuzz.py makes them)."""

from __future__ import annotations

from tests.fuzz import fuzz
from tests.torture.trial import Trial

INPUTS = 100_000


def torture(trial: Trial) -> None:
    figures = fuzz(trial.count(INPUTS), trial.seed)
    trial.tried = figures["inputs"]
    trial.bad = [f"{fault['target']}: {fault['fault']}: {fault['input']}" for fault in figures["faults"]]
    seconds, target = figures["slowest"]
    trial.note = (
        f"{figures.get('read', 0):,} read, {figures.get('refused', 0):,} refused; the slowest took {seconds} s "
        f"({target}); memory grew by {figures['memory_growth_bytes'] / 2**20:.0f} MiB"
    )
