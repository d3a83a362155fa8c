"""How fast a model writes with a draft, beside itself without one: in turns, the same text both ways."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from hldm.config import GenerationConfig
from hldm.evaluation.tables import Table, row
from hldm.generation.draft import Draft
from hldm.generation.writer import Writer, make_writer, row_generators
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.runs.clock import in_turns, median_ratio
from hldm.text.bytes import count_characters

TURNS = 5
ROWS = (1, 8, 64)
CHARACTERS_A_TURN = 300  # of all rows together, at least
PROMPT = b"And the king said to them, "


class Drafted(NamedTuple):
    """A model and what guesses its text."""

    autoencoder: Autoencoder
    prior: Prior | None
    settings: GenerationConfig
    draft: Draft


class _Continuing:
    """One prompt, or several, written on."""

    def __init__(self, writer: Writer, rows: int):
        self.writer, self.text = writer, [b""] * rows
        self.write()  # warm-up

    def write(self) -> int:
        """A turn more; returns its characters."""
        written = 0
        while written < CHARACTERS_A_TURN:
            for number, piece in enumerate(self.writer.write()):
                self.text[number] += piece.text
                written += count_characters(piece.text)
        return written


@torch.no_grad()
def measure(models: Mapping[str, Drafted], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Characters a second of each model without and with its draft, the ratio, and what the draft got right.

    Raises RuntimeError where the texts differ, which would be our error.
    """
    running: dict[tuple[str, int, bool], _Continuing] = {}
    for name, model in models.items():
        for rows in ROWS:
            for drafted in (False, True):
                parts = model.autoencoder, model.prior, [PROMPT] * rows, model.settings
                generators = row_generators(seed, rows)
                writer = make_writer(*parts, generators, model.draft if drafted else None)
                running[name, rows, drafted] = _Continuing(writer, rows)
    turns = in_turns({key: continuing.write for key, continuing in running.items()}, TURNS)
    rates = {key: [characters / seconds for characters, seconds in found] for key, found in turns.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for name in models:
        for rows in ROWS:
            without, given = (name, rows, False), (name, rows, True)
            for one, other in zip(running[without].text, running[given].text, strict=True):
                if one[: len(other)] != other[: len(one)]:
                    raise RuntimeError(f"{name}, {rows} rows: a draft has changed the text")
            writing = getattr(running[given].writer, "writing", None)
            passes, events, guesses, right = [0] * 4 if writing is None else writing.counts.tolist()
            figures = {
                "plain": statistics.median(rates[without]),
                "drafted": statistics.median(rates[given]),
                "ratio": median_ratio(rates[given], rates[without]),
            }
            if guesses:
                figures |= {"symbols_a_pass": events / passes, "right": right / guesses}
            found[name][str(rows)] = figures
    return found


def report(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `measure` found."""
    rows = []
    for count in map(str, ROWS):
        rows += [
            row(f"{count} at once, characters a second", ",.0f", found, count, "plain"),
            row("  with the draft", ",.0f", found, count, "drafted"),
            row("  times as fast", ".2f", found, count, "ratio"),
            row("  symbols a pass", ".2f", found, count, "symbols_a_pass"),
            row("  guesses that were right", ".1%", found, count, "right"),
        ]
    return Table(["writing, the same text", *found], [line for line in rows if set(line[1:]) != {"-"}])
