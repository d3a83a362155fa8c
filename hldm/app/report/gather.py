"""Everything that a report of a run shows, as plain values: files read, and what is measured on held-out text.

What is missing is said in the report, in the place where it would stand; what is broken is an error of one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hldm.app.report.denoising import denoising_paths
from hldm.app.report.logs import StageLog, read_logs
from hldm.app.report.passage import Chunks, describe_passage, latent_map, opening_of, read_text
from hldm.app.report.samples import samples_by_temperature
from hldm.config import Config, ConfigError, config_of_run
from hldm.evaluation.evaluate import evaluate_run, weights_of
from hldm.evaluation.parts_table import parts_of_run
from hldm.evaluation.tables import compare
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.runs.export import source_of
from hldm.runs.folder import corpora_of_run, read_totals
from hldm.runs.location import INDEX, find_model, pipeline_of
from hldm.runs.reports import save_report
from hldm.sources.corpora import corpus_of_file
from hldm.sources.notes import first_line
from hldm.text.bytes import END_MARK
from hldm.text.corpus import Corpus

PROMPT_CHUNKS = 24  # of the passage, that samples go on from
MAX_JSON_BYTES = 10_000_000


class Run(NamedTuple):
    """A run folder, read: whatever is there of it."""

    folder: Path
    name: str
    config: Config | None
    logs: list[StageLog]
    pipeline: HLDMPipeline | None  # None: not trained to the end
    corpus: Corpus | None  # held-out text; None: it is not here
    evaluation: dict[str, Any] | None
    notes: list[str]  # what is missing, and what went wrong


def read_run(
    folder: Path, *, text: Path | None = None, measure: bool = False, say: Callable[[str], None] = print
) -> Run:
    """Read a run, finished or not, exported or not, and measure it where no evaluation.json says how good it is.

    text: held-out text to use in place of the run's own test split
    measure: though there is an evaluation.json
    Raises ValueError or OSError, one line, for a folder that is no run and for a file that is broken.
    """
    folder = folder if folder.is_dir() else find_model(folder)
    is_trained = (pipeline_of(folder) / INDEX).is_file()
    logs = read_logs(folder)
    if not is_trained and not logs:
        raise ValueError(
            f"{folder} holds no run: expected {folder / 'pipeline'} or {folder / 'autoencoder'}; train one first"
        )
    notes: list[str] = []
    config_path = folder / "autoencoder" / "config.yaml"
    config = config_of_run(folder) if config_path.is_file() else None
    pipeline = read_pipeline(pipeline_of(folder)) if is_trained else None
    if pipeline is None:
        notes.append("not trained to the end: there is no pipeline, so nothing can be measured or written")
    corpus = None
    if pipeline is not None:
        corpus = _held_out(folder, text, notes)
    evaluation = None if measure or text is not None else read_evaluation(folder / "evaluation.json")
    measured = (evaluation or {}).get("model", "")  # "": it was measured before weights were noted
    if measured and pipeline is not None and measured != weights_of(pipeline):
        say(f"{folder / 'evaluation.json'} is of other weights: it is not used")
        evaluation = None
    if evaluation is None and corpus is not None:
        say(f"measuring {folder} on {corpus.name} (hldm evaluate does the same)")
        evaluation = evaluate_run(folder, text=text)
        if (
            text is None and (folder / "autoencoder" / "checkpoints").is_dir()
        ):  # trained here: others can use it, too
            save_report(folder / "evaluation.json", evaluation)
    name = folder.resolve().name
    return Run(folder, name, config, logs, pipeline, corpus, evaluation, notes)


def _held_out(folder: Path, text: Path | None, notes: list[str]) -> Corpus | None:
    """The text that a report reads; None, and a note, where a run's own is not on this machine."""
    if text is not None:
        return corpus_of_file(text)
    try:
        return corpora_of_run(folder)["test"]
    except (OSError, ConfigError) as error:
        reason = first_line(error).partition("; or pass --text")[0]
        notes.append(f"no passage and no figures: its text is not here ({reason}); --text FILE reads another")
        return None


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """What `hldm demo` or `hldm evaluate --json` left; None where nothing is. Raises ValueError when it is broken."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes()[:MAX_JSON_BYTES])
        compare({"run": found})  # it has what a table takes
        if float(found["bits_per_character"]["bound"]) > 0:
            return dict(found)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path} is no evaluation: delete it, and the report measures the run anew")


def parts_of(run: Run, text: Path | None = None) -> dict[str, Any] | None:
    """The short parts table of a run, from its evaluation or measured now; None for a twin, or without a text."""
    found = (run.evaluation or {}).get("parts")
    if isinstance(found, dict):
        return found
    if run.pipeline is None or run.pipeline.prior is None or run.corpus is None:
        return None
    return parts_of_run(run.folder, text=text, short=True)


def look(run: Run, other: Run | None = None, *, seed: int = 0) -> dict[str, Any]:
    """What a trained model is asked for the report: passage, map, denoising paths, samples; None where it cannot.

    other: a twin, whose bits of the same chunks stand beside
    """
    nothing: dict[str, Any] = {"passage": None, "map": None, "paths": [], "samples": [], "prompt": ""}
    if run.pipeline is None or run.corpus is None:
        return nothing
    autoencoder, prior = run.pipeline.autoencoder, run.pipeline.prior
    corpus = opening_of(run.corpus)
    chunks = read_text(autoencoder, prior, corpus, seed=seed)
    passage = describe_passage(chunks, _bits_of_other(run, other, corpus, chunks, seed))
    within = chunks.texts[: len(passage)]
    prompt = within[: min(PROMPT_CHUNKS, max(1, len(within) // 2))]
    found = {
        "passage": passage,
        "map": None if prior is None else latent_map(chunks),
        "paths": [],
        "samples": samples_by_temperature(run.pipeline, b"".join(prompt), seed=seed),
        "prompt": with_ends(prompt, chunks.opens),
    }
    if prior is not None:
        found["paths"] = denoising_paths(autoencoder, prior, within, run.pipeline.settings)
    return found


def with_ends(texts: list[bytes], opens: np.ndarray) -> str:
    """Chunks joined, END_MARK and a line's end where a document ends. opens: (n,) bool, the first of a document"""
    parts = []
    for index, text in enumerate(texts):
        parts += [f"{END_MARK}\n".encode()] if index and opens[index] else []
        parts.append(text)
    return b"".join(parts).decode("utf-8", "replace")


def _bits_of_other(
    run: Run, other: Run | None, corpus: Corpus, chunks: Chunks, seed: int
) -> list[float] | None:
    """Bits of the same chunks under the run that is compared with: of a twin, or of one that cuts alike."""
    if other is None or other.pipeline is None:
        return None
    autoencoder, prior = other.pipeline.autoencoder, other.pipeline.prior
    if prior is None:
        return read_text(autoencoder, None, corpus, starts=chunks.starts).bits.tolist()
    found = read_text(autoencoder, prior, corpus, seed=seed)
    return found.bits.tolist() if found.texts == chunks.texts else None


def origin_of(run: Run) -> list[tuple[str, str]]:
    """How a run was made: cost of each stage, commit, machine. No command line: it may name private folders."""
    found: list[tuple[str, str]] = []
    for stage in ("autoencoder", "prior"):
        path = run.folder / stage
        if (path / "totals.json").is_file():
            totals = read_totals(path)
            found.append(
                (
                    f"{stage}, training",
                    f"{totals.steps:,} steps, {totals.seconds / 60:.1f} minutes, {totals.characters:,} characters",
                )
            )
    if run.config is not None:
        found.append(("text", source_of(run.config.data)))
    path = run.folder / "autoencoder" / "environment.json"
    if path.is_file():
        try:
            environment = json.loads(path.read_bytes()[:MAX_JSON_BYTES])[-1]
            keys = {"commit": "commit", "cpu": "processor", "accelerators": "accelerators", "torch": "torch"}
            for key, name in keys.items():
                if value := environment.get(key):
                    found.append((name, ", ".join(value) if isinstance(value, list) else str(value)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} is damaged: delete it, and the report says nothing of it") from None
    found.append(("report", f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, torch {torch.__version__}"))
    return found
