"""The family's table: every option, control, view and switch as a row, trained alike and measured alike.

    hldm jepa table --config configs/jepa-small.yaml --minutes 10

Each row is a run like any other, so that a table which was stopped goes on. TF-IDF and the untrained encoder stand in
the same table: without them no figure means anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hldm.chunking.strategies import read_segmenter
from hldm.config import ConfigError, changed, to_dict
from hldm.evaluation.tables import Table, cell
from hldm.jepa.collapse import RANK_SHARE
from hldm.jepa.config import JepaConfig, load_jepa_config
from hldm.jepa.objective import letters_of
from hldm.jepa.representations import jepa_source, untrained_source
from hldm.jepa.similarity import Verses, choose_verses, measure, without_nan
from hldm.jepa.text_pairs import read_corpora
from hldm.jepa.train import read_objective, train_jepa, watched
from hldm.jepa.translations import installed
from hldm.plugins import allow
from hldm.runs.files import atomic_write
from hldm.runs.folder import check_settings, read_totals, require_same_text
from hldm.runs.identity import (
    MAY_CHANGE_ONCE_TRAINED,
    differences,
    measured_once,
    origin_of,
    say_other_code,
    text_fingerprint,
)
from hldm.runs.provenance import code_fingerprint
from hldm.runs.reports import save_report
from hldm.text.corpus import Corpus

_VIEWS = ("task=views", "data.lanes=16")  # 16 sentences hold about as many bytes as 8 windows of 256
_OPTION_1 = "objective.option=latents"
# Every row, and what it changes over the config. Views and transformations are of option 3.
ROWS: Mapping[str, tuple[str, ...]] = {
    "autoencoder": ("objective.option=autoencoder",),
    "option-3": ("objective.option=encoder_decoder",),
    "option-1": (_OPTION_1,),
    "option-2": ("objective.option=predicted",),
    "masked": ("objective.option=masked",),
    # views in place: chunks are predicted
    "null-chunks": ("views.kind=null-chunks",),
    "null-bytes": ("views.kind=null-bytes", "views.share=0.15"),
    "random-chars": ("views.kind=random-chars", "views.share=0.15"),
    "case": ("views.kind=case", "views.share=0.5"),
    # views that are other texts: sentences are predicted; identity is the negative control, translation the positive
    "identity": (*_VIEWS, "views.kind=none"),
    "translation": (*_VIEWS, "views.kind=translation"),
    "word-drop": (*_VIEWS, "views.kind=word-drop", "views.share=0.15"),
    "order": (*_VIEWS, "views.kind=order"),
    "sentence-order": (*_VIEWS, "views.kind=sentence-order"),
    "typos": (*_VIEWS, "views.kind=typos", "views.share=0.15"),
    "crop": (*_VIEWS, "views.kind=crop"),
    "back-off": (*_VIEWS, "views.kind=back-off"),
    # against collapse, of option 1, which has nothing else against it
    "1-vicreg": (_OPTION_1, "objective.variance=1", "objective.covariance=0.04"),
    "1-sigreg": (_OPTION_1, "objective.sigreg=0.02"),
    "1-slow-target": (_OPTION_1, "objective.momentum=0.999"),
    "1-own-target": (_OPTION_1, "objective.target=own"),
    "1-gradient": (_OPTION_1, "objective.target=gradient"),
    "1-no-reset": (_OPTION_1, "objective.reset_targets=false"),
    "1-layer-norm": (_OPTION_1, "objective.normalise=layer_norm"),
    "1-cosine": (_OPTION_1, "objective.distance=cosine"),
    "1-holes-of-length": (_OPTION_1, "views.hole_bytes=0"),
    "1-past": (_OPTION_1, "predictor.kind=griffin"),
    # LANG-JEPA: the next sentence
    "next-sentence": (
        "task=sentences",
        "data.lanes=16",
        _OPTION_1,
        "views.kind=none",
        "objective.distance=cosine",
    ),
}
UNTRAINED = "untrained"
STAGES = ("jepa",)
REPORT = "row.json"


class Entry(NamedTuple):
    """One row with one seed."""

    row: str
    config: JepaConfig  # whose name is that of its run, below the table's folder


def entry_of(
    paths: Sequence[Path], overrides: Sequence[str], row: str, minutes: float, seed: int | None = None
) -> Entry:
    """A row's config: overrides are of all rows, and what a row changes comes after them.

    seed: that of the config when None. Raises ConfigError.
    """
    if not 0 < minutes < math.inf:
        raise ConfigError(f"--minutes must be positive and finite, got {minutes:g}")
    config = load_jepa_config(paths, [*overrides, *ROWS.get(row, ())])
    seed = config.seed if seed is None else seed
    jepa = changed(config.training.jepa, minutes=minutes, steps=10**9)
    training = changed(config.training, jepa=jepa, clock="cpu")
    return Entry(row, changed(config, name=f"{row}-seed-{seed}", seed=seed, training=training))


def choose_rows(only: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The rows that are asked for, all when none is named. Raises ConfigError for one that there is not.

    Without a name the translations are left out, which is said, where their packages are not installed.
    """
    for name in only:
        if name not in ROWS:
            raise ConfigError(f"--only takes {', '.join(ROWS)}, got {name!r:.80}")
    missing = sorted({"asv", "web"} - set(installed()))
    if not missing or "translation" not in (only or ROWS):
        return list(only or ROWS)
    way_out = f"pip install {' '.join(f'pythonbible-{name}' for name in missing)}"
    if only:
        raise ConfigError(f"translation needs packages that are not installed: {way_out}")
    say(f"translation is left out, for it needs packages: {way_out}")
    return [name for name in ROWS if name != "translation"]


def run_table(
    paths: Sequence[Path],
    minutes: float,
    *,
    only: Sequence[str] = (),
    seeds: int = 1,
    verses: int = 2000,
    overrides: Sequence[str] = (),
    root: Path = Path("runs"),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and measure what is not there yet, one seed after another; returns the results.

    minutes: of CPU time, each row;  verses: of training books, for whitening and neighbours
    Leaves root/<name>-table/<row>-seed-<seed>/, by the config's name, with row.json in each, and beside them
    table.json and table.md, rewritten after each row. Rows of earlier calls stay in them if they were trained by these
    settings and measured by this code. Raises ValueError or OSError.
    """
    asked = choose_rows(only, say)
    base = load_jepa_config(paths, overrides)
    if base.task != "chunks":
        raise ConfigError(f"{paths[-1]} has task={base.task}, which rows choose for themselves: leave it out")
    allow([base.chunking.strategy])
    every = [base.seed + number for number in range(seeds)]
    todo = [entry_of(paths, overrides, row, minutes, seed) for seed in every for row in (UNTRAINED, *asked)]
    corpora = read_corpora(base)
    chosen = choose_verses([name for name in ("asv", "ylt") if name in installed()], verses)
    folder = root / f"{base.name}-table"
    measured_by = {
        "code": code_fingerprint(),
        "text": text_fingerprint(corpora),
        "verses": f"{len(chosen.sample)} {' '.join(chosen.texts)}",
    }
    table: dict[str, Any] = {"config": [str(path) for path in paths], "name": base.name}
    table |= {"overrides": list(overrides), "minutes": minutes, "clock": "cpu"}
    table |= {"translation": list(chosen.texts)[-1], "verses": len(chosen.numbers)}
    names = {entry.config.name for entry in todo}
    rows, left_out = _earlier_rows(folder, names, measured_by, paths, overrides, minutes)
    for line in left_out:
        say(line)
    table["tfidf"] = measure([], chosen)
    for number, entry in enumerate(todo, start=1):
        say(f"row {number} of {len(todo)}: {entry.config.name}")
        rows.append(_measured(entry, folder, chosen, corpora, measured_by, say))
        order = [UNTRAINED, *ROWS]
        table["rows"] = sorted(rows, key=lambda found: (order.index(found["row"]), found["seed"]))
        save_report(folder / "table.json", table)
        atomic_write(folder / "table.md", f"{table_of(table)}\n")
    say_other_code([found for found in table["rows"] if found["row"] != UNTRAINED], say)
    return table


def _measured(
    entry: Entry,
    folder: Path,
    verses: Verses,
    corpora: Mapping[str, Corpus],
    measured_by: Mapping[str, str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train and measure one row, or read what was measured before."""
    config, target = entry.config, folder / entry.config.name / REPORT
    names = {"row": entry.row, "name": config.name, "seed": config.seed}
    if entry.row == UNTRAINED:
        target.parent.mkdir(parents=True, exist_ok=True)
        origin = {**measured_by, "model": _shape(config), "trained": ""}

        def work() -> dict[str, Any]:
            return names | {"kinds": _meaning([untrained_source(config, config.seed)], verses)}
    else:
        run = trained_row(config, folder, corpora, say)
        origin = {**origin_of(run, measured_by["text"], "jepa/model/*", STAGES), **measured_by}

        def work() -> dict[str, Any]:
            totals = read_totals(run / "jepa")
            found: dict[str, Any] = {"characters": totals.characters, "minutes": totals.seconds / 60}
            found["signs"] = signs_of_run(run, config, corpora)
            return names | found | {"kinds": _meaning([jepa_source(run)], verses)}

    return measured_once(target, origin, work, say)


def trained_row(
    config: JepaConfig, folder: Path, corpora: Mapping[str, Corpus], say: Callable[[str], None]
) -> Path:
    """A row's run, trained, gone on with where it was stopped, or there already.

    Raises ValueError where what is there was trained with other settings or on another text.
    """
    stage = folder / config.name / "jepa"
    check_settings(stage, to_dict(config), MAY_CHANGE_ONCE_TRAINED)
    if (stage / "totals.json").is_file():
        require_same_text(stage, corpora["train"])
        say(f"reusing {stage} (remove it to train it again)")
        return stage.parent
    return train_jepa(config, resume=stage.is_dir(), root=folder)


def signs_of_run(run: Path, config: JepaConfig, corpora: Mapping[str, Corpus]) -> dict[str, float]:
    """The live figures (`JepaObjective.signs`) of a trained run's averaged weights, on the watched held-out text."""
    objective = read_objective(run, config)
    objective.letters.copy_(letters_of(corpora["train"].text))
    segmenter = read_segmenter(run / "segmenter" / "model", config.chunking)
    objective.held_out = watched(config, corpora, segmenter)
    signs = objective.signs()
    del signs["untrained_rank"]  # of the objective's first weights, which are not these
    return dict(without_nan(signs))


def _meaning(sources: Sequence[Any], verses: Verses) -> dict[str, Any]:
    return {record["kind"]: record for record in measure(sources, verses, terms={})}


def _shape(config: JepaConfig) -> str:
    """What an untrained encoder depends on."""
    return repr((config.encoder, config.vector, config.chunking))


def _earlier_rows(
    folder: Path,
    names: set[str],
    measured_by: Mapping[str, str],
    paths: Sequence[Path],
    overrides: Sequence[str],
    minutes: float,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of earlier calls, beside these names, that may stand in one table, and a line for each that may not."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for path in sorted(folder.glob(f"*/{REPORT}")):
        if path.parent.name in names:
            continue
        try:
            found = json.loads(path.read_bytes())
            row, seed, origin = found["row"], found["seed"], dict(found["origin"])
        except (ValueError, LookupError, TypeError, RecursionError):
            left_out.append(f"{path} is left out, for it is damaged: ask for the row to measure it again")
            continue
        if row not in (UNTRAINED, *ROWS):
            left_out.append(f"{path.parent} is left out: this code has no such row")
            continue
        wrong = differences(origin, measured_by)
        config = entry_of(paths, overrides, row, minutes, seed).config
        if row == UNTRAINED:
            wrong = wrong or ("" if origin["model"] == _shape(config) else "an encoder of another shape")
        else:
            try:
                check_settings(path.parent / "jepa", to_dict(config), MAY_CHANGE_ONCE_TRAINED)
            except ValueError as error:
                wrong = str(error)
        if wrong:
            left_out.append(f"{path.parent} is left out, made of {wrong}: ask for it to measure it again")
        else:
            rows.append(found)
    return rows, left_out


# ---- the table


def table_of(table: Mapping[str, Any]) -> Table:
    """A line a row and kind of vectors, means over seeds; `!` marks a rank below half of the untrained encoder's.

    Recall of verses in the table's translation, by whitened cosine at 1 and at 5, with the standard error over seeds;
    at 1 by raw and centred cosine; R2 beyond length and shuffle gap of the predictor; books by five neighbours.
    """
    other = table["translation"]
    heads = ["row", "seeds", f"{other} @1", "±", "@5", "MRR", "raw @1", "centred @1", "rank", "untrained"]
    heads += ["R2 beyond length", "shuffle gap", "book 5-NN", "characters", "minutes"]
    lines = [_line(record["source"], [record], other, {}) for record in table["tfidf"]]
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for found in table["rows"]:
        by_row.setdefault(found["row"], []).append(found)
    for kind in ("latents", "features"):
        untrained = [found["kinds"][kind]["rank"] for found in by_row.get(UNTRAINED, [])]
        for name, found in by_row.items():
            more = {key: _mean(one.get("signs", {}).get(key) for one in found) for key in SIGNS}
            more = more if kind == "latents" else {}
            more |= {key: _mean(one.get(key) for one in found) for key in ("characters", "minutes")}
            records = [one["kinds"][kind] for one in found]
            lines.append(_line(f"{name} {kind}", records, other, more, _mean(untrained)))
    return Table(heads, lines)


SIGNS = ("r2_beyond_length", "shuffle_gap")
LEGEND = """\
NAME @1, @5       verses whose nearest vector, or one of the five nearest, in that translation is the same verse,
                  whitened; ±: standard error over seeds; MRR: mean of 1 / place; raw, centred: @1 by those cosines
rank, untrained   independent directions in which vectors of verses vary, trained and not; !: below half of it, collapse
R2 beyond length  of the predictor on held-out text, beyond what a chunk's length tells: 0 is worth nothing
shuffle gap       cosine with the right target less that with another
book 5-NN         accuracy of the book that most of the five nearest verses of training books are of"""


def _line(
    name: str,
    records: Sequence[Mapping[str, Any]],
    other: str,
    more: Mapping[str, float | None],
    untrained: float | None = None,
) -> list[str]:
    """Cells of one line. records: of each seed, by hldm.jepa.similarity.measure;  untrained: rank."""

    def recall(frame: str, key: str) -> list[float]:
        retrieval = [record["retrieval"][other] for record in records]
        return [found[frame][key] for found in retrieval if frame in found]

    best = "whitened" if "whitened" in records[0]["retrieval"][other] else "raw"
    at_1 = recall(best, "recall_1")
    spread = torch.tensor(at_1).std() / math.sqrt(len(at_1)) if len(at_1) > 1 else None
    rank = _mean(record.get("rank") for record in records)
    alarm = " !" if rank is not None and untrained is not None and rank < RANK_SHARE * untrained else ""
    return [
        name,
        str(len(records)),
        cell(_mean(at_1), ".3f"),
        cell(None if spread is None else float(spread), ".3f"),
        cell(_mean(recall(best, "recall_5")), ".3f"),
        cell(_mean(recall(best, "mrr")), ".3f"),
        cell(_mean(recall("raw", "recall_1")), ".3f"),
        cell(_mean(recall("centred", "recall_1")), ".3f"),
        cell(rank, ".1f") + alarm,
        cell(untrained, ".1f"),
        *(cell(more.get(key), ".3f") for key in SIGNS),
        cell(_mean(record.get("probes", {}).get("book_nearest") for record in records), ".3f"),
        cell(more.get("characters"), ",.0f"),
        cell(more.get("minutes"), ".1f"),
    ]


def _mean(values: Any) -> float | None:
    """Of those that are there."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
