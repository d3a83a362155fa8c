"""Where a text is cut: `hldm chunk` on a terminal, as JSON, or as a page with one strategy below another."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hldm.chunking.chunker import TEXT_STRATEGIES, make_chunker
from hldm.chunking.segmenter import Segmenter
from hldm.chunking.strategies import SEGMENTERS, read_segmenter, sample_of, shipped_segmenter
from hldm.config import ChunkingConfig, ConfigError, DataConfig, changed, config_of_run
from hldm.plugins import allow
from hldm.settings import is_own
from hldm.sources.corpora import load_corpus
from hldm.text.bytes import printable, tinted
from hldm.text.corpus import Corpus

TINTS = ("#cfe8ff", "#ffe6b3")  # light blue and light orange, told apart without colour vision
STYLE = (
    "body{font:16px/1.7 sans-serif;margin:2em auto;max-width:60em;color:#000;background:#fff}"
    "p{white-space:pre-wrap;overflow-wrap:anywhere}h2{font-size:1em;margin:1.5em 0 0}"
    f"p span{{background:{TINTS[0]}}}p span:nth-child(even){{background:{TINTS[1]}}}"
)
CUTS = {  # where a strategy begins a chunk, within min_bytes and max_bytes
    "fixed": "every so many bytes",
    "words": "at white space",
    "space": "at what is no letter or digit",
    "sentence": "after a sentence",
    "paragraph": "after a blank line",
    "entropy": "where a small byte model does not know what comes",
    "state_change": "where that model's state moves far",
    "gate": "where that model's gates let go",
    "learned": "where a router, trained through a decoder's loss, turns",
    "reinforce": "where a policy puts it that is rewarded for few bits and few chunks",
    "select": "after the best-scored bytes of a stretch",
    "queries": "after the bytes that learned queries attend to",
    "phrase": "where a speaker would pause",
}
SAMPLE_BYTES = 16_384  # of text that sets a shipped segmenter's threshold: half a second of reading
PAGE_MARK = b"<!doctype html><!-- hldm chunk -->"  # how such a page begins


def cut_text(
    text: bytes,
    strategies: Sequence[str],
    runs: Sequence[Path] = (),
    *,
    chunking: ChunkingConfig,
    whole_bytes: int | None = None,
    train: Callable[[ChunkingConfig, Corpus], Segmenter] | None = None,
) -> dict[str, list[bytes]]:
    """Chunks of a text by strategy, then by the chunking of each run.

    strategies: by name, or module:Class of one's own, whose code is run

    chunking: the limits of strategies that are named, and the mean length of those that ask a model
    whole_bytes: the most that a sentence or paragraph may hold; None: as any chunk
    train: makes a segmenter for each strategy that takes one, from the built-in text; None: those that come with hldm
        are asked, their thresholds set on the built-in text
    Raises ConfigError for a strategy that is unknown, ValueError or OSError for a run.
    """
    if not text:
        raise ValueError("the text is empty: there is nothing to cut")
    known = (*TEXT_STRATEGIES, *SEGMENTERS)
    for strategy in strategies:
        if strategy not in known and not is_own(strategy):
            raise ConfigError(f"--strategy takes {', '.join(known)} or module:Class, got {strategy!r:.80}")
    allow(filter(is_own, strategies))
    corpus = load_corpus(DataConfig(), "train") if set(strategies) & SEGMENTERS.keys() else None
    asked: dict[str, tuple[ChunkingConfig, Segmenter | None]] = {}
    for strategy in strategies:
        settings = changed(chunking, strategy=strategy)
        if strategy in ("sentence", "paragraph") and whole_bytes is not None:
            settings = changed(settings, max_bytes=whole_bytes)
        segmenter = None
        if corpus is not None and settings.needs_segmenter:
            sample = sample_of(corpus, SAMPLE_BYTES)
            segmenter = shipped_segmenter(settings, sample) if train is None else train(settings, corpus)
        asked[strategy] = settings, segmenter
    for run in runs:
        path = run / "autoencoder" / "config.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"{run} holds no run: hldm train makes one")
        settings = config_of_run(run).chunking
        segmenter = read_segmenter(run / "pipeline" / "segmenter", settings)
        asked[f"{settings.strategy} ({run.name})"] = settings, segmenter
    return {name: split(text, make_chunker(*parts).chunk_start(text)) for name, parts in asked.items()}


def split(text: bytes, is_start: np.ndarray) -> list[bytes]:
    """The chunks of a text that start where is_start (t,) says."""
    borders = [*np.flatnonzero(is_start).tolist(), len(text)]
    return [text[begin:end] for begin, end in zip(borders, borders[1:], strict=False)]


def as_json(cuts: Mapping[str, Sequence[bytes]]) -> str:
    """An object a strategy: its name, the bytes of each chunk, their mean."""
    found = [
        {"strategy": name, "mean_bytes": _mean(chunks), "bytes": [len(chunk) for chunk in chunks]}
        for name, chunks in cuts.items()
    ]
    return json.dumps(found)


def as_text(cuts: Mapping[str, Sequence[bytes]], colour: bool) -> str:
    """Every strategy's chunks, in two tints by turns, or with | between them."""
    parts = []
    for name, chunks in cuts.items():
        pieces = [printable(chunk.decode(errors="replace")) for chunk in chunks]
        body = "".join(map(tinted, pieces, range(len(pieces)))) if colour else "|".join(pieces)
        parts.append(f"{_heading(name)}: {_mean(chunks):.2f} bytes a chunk\n{body}\n")
    return "\n".join(parts)


def as_page(cuts: Mapping[str, Sequence[bytes]]) -> str:
    """A page that stands on its own: no script, nothing loaded, the text escaped."""
    parts = []
    for name, chunks in cuts.items():
        spans = "".join(f"<span>{html.escape(printable(c.decode(errors='replace')))}</span>" for c in chunks)
        parts.append(
            f"<h2>{html.escape(_heading(name))}: {len(chunks)} chunks of {_mean(chunks):.2f} bytes</h2><p>{spans}</p>"
        )
    head = f'<meta charset="utf-8"><title>Where the text is cut</title><style>{STYLE}</style>'
    return f"{PAGE_MARK.decode()}<html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _heading(name: str) -> str:
    """A strategy, and where it begins a chunk."""
    told = CUTS.get(name.split(" (")[0], "")
    return printable(" ".join(name.split())) + (f", {told}" if told else "")


def _mean(chunks: Sequence[bytes]) -> float:
    return sum(map(len, chunks)) / max(len(chunks), 1)
