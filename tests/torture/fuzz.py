"""Fuzzed texts, prompts, configs and files: accepted or refused in one line (tests/fuzz.py makes them)."""

from __future__ import annotations

from tests.torture.trial import Skipped, Trial

INPUTS = 100_000


def torture(trial: Trial) -> None:
    try:
        from tests.fuzz import fuzz
    except ModuleNotFoundError as error:
        raise Skipped("tests/fuzz.py is not there") from error
    figures = fuzz(trial.count(INPUTS), trial.seed)
    bad = figures["bad"]
    trial.tried = figures["tried"]
    trial.bad = [str(line) for line in bad] if isinstance(bad, list) else ["not survived"] * int(bad)
    trial.note = f"{figures['accepted']:,} accepted, {figures['refused']:,} refused"
