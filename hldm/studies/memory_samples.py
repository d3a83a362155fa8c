"""What a model writes with a memory beside what it writes without: judged text, what is copied, what it takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hldm.chunking.reading import held_out_windows
from hldm.evaluation.metrics import TrainingText, diversity
from hldm.evaluation.prompts import choose_prompts, prompt_chunker
from hldm.evaluation.tables import Table
from hldm.generation.memory import NEIGHBOURS, Gate
from hldm.generation.memory_store import Store
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.generation.remembering import (
    Memory,
    RememberingWriter,
    check_remembers,
    document_neighbours,
    own_entries,
    read_past,
)
from hldm.generation.writer import Through, Writer, write_on
from hldm.runs.folder import corpora_of_run, training_text_of
from hldm.runs.location import pipeline_of
from hldm.sources.corpora import corpus_of_file
from hldm.studies.judge import SPAN, NGram
from hldm.studies.memory import index_of, store_and_gates
from hldm.text.bytes import count_characters
from hldm.text.corpus import Corpus

QUERIES = 256  # that are timed, one by one as a writer asks and all at once as a measurement does


def measure_samples(
    folder: Path,
    memory: str,
    *,
    text: Path | None = None,
    prompts: int = 24,
    max_characters: int = 400,
    seed: int = 0,
) -> dict[str, Any]:
    """Continuations of held-out prompts, plain and with each memory, and the cost of its queries.

    Raises ValueError or OSError, one line.
    """
    pipeline = read_pipeline(pipeline_of(folder))
    store, gates = store_and_gates(memory, pipeline)
    judged: NGram | None = None
    training: bytes | None
    if text is None:
        corpora = corpora_of_run(folder)
        corpus, training = corpora["test"], corpora["train"].text.tobytes()
        judged = NGram(corpora["validation"].text.tobytes())
    else:
        corpus, training = corpus_of_file(text), training_text_of(folder)
    chosen = choose_prompts(
        corpus, prompt_chunker(pipeline.autoencoder), prompts, max_characters=max_characters
    )
    if not chosen:
        raise ValueError(f"{corpus.name} has no room for a prompt and a continuation: take a longer text")
    starts = [prompt.text for prompt in chosen]
    known = None if training is None else TrainingText(training, SPAN)

    def row(name: str, gate: Gate | None) -> dict[str, Any]:
        remembered = None
        if gate is not None:
            needed = store if "training" in gate.sources else None
            remembered = Memory(needed, gate, index_of(memory, check_remembers(pipeline.prior)))
        texts, record = write_with(pipeline, remembered, starts, max_characters, seed)
        decoded = [each.decode("utf-8", "replace") for each in texts]
        bits = None
        if judged is not None:
            pairs = zip(starts, texts, strict=True)
            bits = sum(judged.bits(a + b, begin=len(a)) for a, b in pairs) / sum(map(count_characters, texts))
        return {
            "name": name,
            **record,
            "ngram_bits": bits,
            "known_words": None if known is None else known.known_words(decoded),
            "repetition": diversity(decoded)["repetition"],
            "copied": None if known is None else known.copied_share(texts),
            "longest": None if training is None else longest_copy(texts, training),
        }

    rows = [row("plain", None), *(row(mode, gate) for mode, gate in gates.items())]
    return {
        "prompts": len(chosen),
        "max_characters": max_characters,
        "rows": rows,
        "queries": time_queries(pipeline, store, corpus),
    }


def write_with(
    pipeline: HLDMPipeline,
    memory: Memory | None,
    prompts: Sequence[bytes],
    max_characters: int,
    seed: int,
) -> tuple[list[bytes], dict[str, Any]]:
    """Continue prompts, through the ends of documents; what was written, and what that took."""
    made: list[RememberingWriter] = []
    through: Through | None = None
    if memory is not None:

        def through(writer: Writer, texts: Sequence[bytes]) -> Writer:
            made.append(memory.through(writer, texts))
            return made[0]

    parts = pipeline.autoencoder, pipeline.prior, prompts, pipeline.settings
    began = time.perf_counter()
    writing = write_on(*parts, max_characters=max_characters, seed=seed, through_ends=True, through=through)
    rows, _, _ = deque(writing, maxlen=1).pop()
    seconds = time.perf_counter() - began
    texts = [row.text for row in rows]
    recalled = made[0].recalled / max(made[0].written, 1) if made else 0.0
    speed = sum(map(count_characters, texts)) / seconds
    return texts, {"recalled": recalled, "characters_per_second": speed}


def longest_copy(texts: Sequence[bytes], training: bytes) -> int:
    """Bytes of the longest stretch of these texts, from the start of a word on, that stands in the training text."""
    best = 0
    for text in texts:
        for start in [0, *(at + 1 for at, byte in enumerate(text) if byte == ord(" "))]:
            while start + best < len(text) and text[start : start + best + 1] in training:
                best += 1
    return best


def time_queries(pipeline: HLDMPipeline, store: Store | None, corpus: Corpus) -> list[dict[str, Any]]:
    """Microseconds a query of every way to search, and how much of the exact answer each finds."""
    windows = held_out_windows(pipeline.autoencoder, corpus)
    past = read_past(pipeline.autoencoder, windows)
    began = time.perf_counter()
    document_neighbours(past)
    each = (time.perf_counter() - began) / len(past.prints)
    rows: list[dict[str, Any]] = [{"search": "document, exact", "at_once": 1e6 * each}]
    if store is None:
        return rows
    index = torch.linspace(0, len(past.prints) - 1, min(QUERIES, len(past.prints))).long()
    keys = store.project(past.query[index]).numpy()
    own = own_entries(store, corpus, past.document)[index.numpy()]
    exact = Store(store.folder, store.model, exact=True)
    _, truth = exact.search(keys, own, NEIGHBOURS)
    for name, which in (("store, exact", exact), ("store, index", store)):
        if which.index is None and which is store:
            continue
        began = time.perf_counter()
        _, found = which.search(keys, own, NEIGHBOURS)
        batch = (time.perf_counter() - began) / len(keys)
        few = keys[: 64 if which is store else 8]
        began = time.perf_counter()
        for key in few:
            which.search(key[None], None, NEIGHBOURS)
        single = (time.perf_counter() - began) / len(few)
        pairs = zip(found, truth, strict=True)
        recall = float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in pairs]))
        rows.append({"search": name, "at_once": 1e6 * batch, "alone": 1e6 * single, "recall": recall})
    return rows


WRITTEN: Mapping[str, tuple[str, str]] = {
    "written": ("name", ""),
    "recalled chunks": ("recalled", ".1%"),
    "n-gram bits": ("ngram_bits", ".3f"),
    "known words": ("known_words", ".1%"),
    "repetition": ("repetition", ".3f"),
    f"copied, {SPAN} bytes": ("copied", ".2%"),
    "longest copy": ("longest", ",d"),
    "chars/s": ("characters_per_second", ",.0f"),
}
SEARCHED: Mapping[str, tuple[str, str]] = {
    "search": ("search", ""),
    "us a query, many at once": ("at_once", ",.0f"),
    "one by one": ("alone", ",.0f"),
    f"recall of {NEIGHBOURS}": ("recall", ".1%"),
}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """What was written, and what searching takes."""
    return [Table.of_records(found["rows"], WRITTEN), Table.of_records(found["queries"], SEARCHED)]
