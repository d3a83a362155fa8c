"""What the text on the right says of what stands before it: a choice between the truth and candidates.

    -log2  p(m | left) p(right | left, m)  /  sum over the truth and 63 drawn candidates,   and without p(right | ...)

The probability of a missing text given both sides has a marginal in it that nobody can sum; a choice needs none. Truth
and candidates have the same number of chunks and both end with one, so that length and a word cut in two give nothing
away; candidates are drawn at temperature 1, from the very p(m | left), and none of them is the truth.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hldm.chunking.reading import prompt_chunker
from hldm.config import changed
from hldm.evaluation.prompts import choose_prompts
from hldm.evaluation.tables import Table
from hldm.generation.fill import cost_candidates, draw_candidates
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.runs.clock import clock_named
from hldm.runs.folder import corpora_of_run
from hldm.runs.location import pipeline_of
from hldm.sources.corpora import corpus_of_file
from hldm.text.corpus import Corpus

LEFT, RIGHT = 150, 100  # characters on either side
CHOICES = 64  # the truth and 63 others: 6 bits by chance

COLUMNS = {
    "bits to find the truth among 64": ("name", ""),
    "bits": ("bits", ".3f"),
    "±": ("error", ".3f"),
    "truth is first": ("first", ".1%"),
}
MEANINGS = {
    "bits": f"-log2 of the truth's share among {CHOICES} texts; 6 by chance",
    "±": "its standard error over places",
    "truth is first": "share of places where no drawn text is thought likelier",
}


class Place(NamedTuple):
    """A stretch of text in three parts, each whole chunks."""

    left: bytes
    middle: list[bytes]
    right: bytes


def places_of(corpus: Corpus, pipeline: HLDMPipeline, count: int, chunks: int) -> list[Place]:
    """At most `count` places spread evenly over a corpus, `chunks` chunks in the middle of each."""
    chunker = prompt_chunker(pipeline.autoencoder)
    most = chunks * chunker.max_bytes + RIGHT + 2 * chunker.max_bytes
    found = []
    for prompt in choose_prompts(corpus, chunker, count, prompt_characters=LEFT, max_characters=most):
        whole = prompt.text + prompt.continuation.encode()
        starts = np.flatnonzero(chunker.chunk_start(whole))
        own = starts[starts >= len(prompt.text)]
        if len(own) < chunks + 2:
            continue
        begin = int(own[chunks])
        # whole chunks, of which the last is left out: the end of the stretch may have cut it
        end = int(own[max(np.searchsorted(own, begin + RIGHT, side="right") - 1, chunks + 1)])
        middle = [whole[a:b] for a, b in zip(own[:chunks], own[1 : chunks + 1], strict=True)]
        found.append(Place(prompt.text, middle, whole[begin:end]))
    return found


def bits_of_first(log2_p: np.ndarray) -> float:
    """-log2 of the first entry's share of 2^log2_p."""
    return float(np.logaddexp2.reduce(log2_p) - log2_p[0])


def measure_filling(
    folder: Path,
    *,
    places: int = 40,
    chunks: int = 3,
    text: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Bits of the truth given the left side, and given both, over places of the test text (or of a file).

    Raises ValueError for a twin, which has no chunks of its own, or a text without room.
    """
    if places < 2 or not 1 <= chunks <= 100:
        raise ValueError(f"--measure takes 2 places or more, of 1..100 chunks, got {places} and {chunks}")
    pipeline = read_pipeline(pipeline_of(folder))
    if pipeline.prior is None:
        raise ValueError(f"{folder} is a twin: it writes no chunks, so there is no number of them to keep")
    corpus = corpora_of_run(folder)["test"] if text is None else corpus_of_file(text)
    # the model's own distribution; fewer, sharper draws would be likelier than the truth for no good reason
    settings = changed(pipeline.settings, temperature=1.0, decoder_temperature=1.0, top_p=1.0, guidance=1.0)
    models = pipeline.autoencoder, pipeline.prior
    rows: list[dict[str, float]] = []
    clock = clock_named("cpu")
    for number, place in enumerate(places_of(corpus, pipeline, places, chunks)):
        truth = b"".join(place.middle)
        began = clock()
        drawn = draw_candidates(
            *models, place.left, CHOICES + CHOICES // 2, settings, chunks=chunks, seed=seed + 1000 * number
        )
        others = {b"".join(each): each for each in drawn}
        others.pop(truth, None)
        middles = [place.middle, *list(others.values())[: CHOICES - 1]]
        costs = cost_candidates(*models, place.left, middles, place.right, seed=seed)
        left, both = -costs.middle, -costs.middle - costs.right
        rows.append(
            {
                "choices": len(middles),
                "seconds": clock() - began,
                "left": bits_of_first(left),
                "right": bits_of_first(-costs.right),
                "both": bits_of_first(both),
                "left_first": float(left.argmax() == 0),
                "right_first": float(costs.right.argmin() == 0),
                "both_first": float(both.argmax() == 0),
            }
        )
    if len(rows) < 2:
        raise ValueError(f"{corpus.name} has no room for two places: take a longer text")
    return _summary(folder, rows, chunks, seed)


def _summary(folder: Path, rows: list[dict[str, float]], chunks: int, seed: int) -> dict[str, Any]:
    """Means over places and their standard errors."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    gain = columns["left"] - columns["both"]
    records = [
        {
            "name": label,
            "bits": columns[key].mean(),
            "error": _error(columns[key]),
            "first": columns[f"{key}_first"].mean(),
        }
        for label, key in (
            ("given the left side", "left"),
            ("by the right side", "right"),
            ("given both", "both"),
        )
    ]
    records.append({"name": "left less both", "bits": gain.mean(), "error": _error(gain), "first": None})
    return {
        "run": folder.resolve().name,
        "places": len(rows),
        "chunks": chunks,
        "choices": float(columns["choices"].mean()),
        "seconds_a_place": float(columns["seconds"].mean()),  # of a CPU core, to draw and to weigh
        "seed": seed,
        "filling": [
            {
                key: value if value is None or isinstance(value, str) else float(value)
                for key, value in record.items()
            }
            for record in records
        ],
        "by_place": rows,
    }


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def table(found: dict[str, Any]) -> Table:
    """What was measured."""
    return Table.of_records(found["filling"], COLUMNS)
