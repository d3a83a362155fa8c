"""What lies between two texts: how near each step is to either end, and whether it is made of words.

Pairs are sentences of the test text. A path that moved meaning would stay text on its way; one that moves spelling
passes through letters that are no words, or jumps from one word to the other.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np

from hldm.evaluation.metrics import TrainingText
from hldm.evaluation.tables import Table
from hldm.generation import interpolate
from hldm.generation.pipeline import read_pipeline
from hldm.runs.clock import clock_named
from hldm.runs.folder import corpora_of_run
from hldm.runs.location import pipeline_of

SENTENCE = (40, 90)  # characters
SPAN = 50  # that `TrainingText` wants to know; copying is not asked about here
COLUMNS = {
    "path": ("path", ""),
    "weight": ("weight", ".2f"),
    "chrF to the first": ("to_first", ".3f"),
    "±": ("to_first_error", ".3f"),
    "chrF to the second": ("to_second", ".3f"),
    "its ±": ("to_second_error", ".3f"),
    "chrF to the step before": ("to_before", ".3f"),
    "known words": ("known", ".1%"),
}
MEANINGS = {
    "weight": "of the second text: 0 is the first, 1 the second",
    "chrF to the first": "likeness in runs of characters, 0 to 1; unrelated sentences have some 0.15",
    "±": "its standard error over pairs",
    "known words": "words that the training text has, too",
}


def sentence_pairs(text: str, count: int) -> list[tuple[str, str]]:
    """Pairs of sentences of a text from places far apart, spread evenly."""
    found = [each.strip() for each in re.findall(r"[A-Z][^.?!]*[.?!]", text)]
    found = [each for each in found if SENTENCE[0] <= len(each) <= SENTENCE[1]]
    if len(found) < 2 * count:
        raise ValueError(
            f"the test text has {len(found)} sentences of {SENTENCE[0]} to {SENTENCE[1]} characters: "
            f"{2 * count} are needed for {count} pairs"
        )
    places = np.linspace(0, len(found) // 2 - 1, count).astype(int)
    return [(found[place], found[place + len(found) // 2]) for place in places]


def measure_interpolation(folder: Path, *, pairs: int = 40, steps: int = 5) -> dict[str, Any]:
    """chrF (Popovic 2015) of each step to both ends and to the step before, and the share of known words."""
    from nltk.translate.chrf_score import sentence_chrf

    if pairs < 2:
        raise ValueError(f"--measure takes 2 pairs or more, got {pairs}")
    pipeline = read_pipeline(pipeline_of(folder))
    corpora = corpora_of_run(folder)
    chosen = sentence_pairs(corpora["test"].text.tobytes().decode("utf-8", "replace"), pairs)
    training = TrainingText(corpora["train"].text.tobytes(), SPAN)
    rows, characters = list[dict[str, Any]](), 0
    clock, spent = clock_named("cpu"), 0.0
    for path in get_args(interpolate.Path):
        written: list[list[str]] = []
        began = clock()
        for first, second in chosen:
            found = interpolate.interpolate_texts(
                pipeline.autoencoder, pipeline.prior, first, second, pipeline.settings, steps=steps, path=path
            )
            written.append([step.text.decode("utf-8", "replace") for step in found])
        spent += clock() - began
        characters += sum(map(len, (text for texts in written for text in texts)))
        for step in range(steps):
            texts = [texts[step] for texts in written]
            scores = {
                "to_first": [sentence_chrf(a, text) for (a, _), text in zip(chosen, texts, strict=True)],
                "to_second": [sentence_chrf(b, text) for (_, b), text in zip(chosen, texts, strict=True)],
                "to_before": [sentence_chrf(each[step - 1], each[step]) for each in written] if step else [],
            }
            row: dict[str, Any] = {
                "path": path,
                "weight": step / (steps - 1),
                "known": training.known_words(texts),
            }
            for name, values in scores.items():
                row[name] = float(np.mean(values)) if values else None
                row[f"{name}_error"] = float(np.std(values, ddof=1) / math.sqrt(pairs)) if values else None
            rows.append(row)
    known = training.known_words([a for pair in chosen for a in pair])
    return {
        "run": folder.resolve().name,
        "pairs": pairs,
        "steps": steps,
        "known_words_of_the_ends": known,
        "characters_per_second": characters / spent,  # of a CPU core's time
        "interpolation": rows,
    }


def table(found: dict[str, Any]) -> Table:
    """A row a path and weight."""
    return Table.of_records(found["interpolation"], COLUMNS)
