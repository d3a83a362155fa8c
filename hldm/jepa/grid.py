"""Weights of the distance and seeds on pairs of views, in one go: exact match of each, and against the baseline.

    hldm jepa grid --config configs/jepa-pairs.yaml --minutes 10 --weight 0 --weight 0.1 --seeds 5

The baseline is weight 0, by the same code. A weight is chosen on validation pairs and reported on test pairs, seed by
seed on the same ones: McNemar's exact test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hldm.config import ConfigError, changed
from hldm.evaluation.tables import Table, cell
from hldm.jepa.config import JepaConfig, load_jepa_config
from hldm.jepa.meaning import mcnemar
from hldm.jepa.table import STAGES, trained_row
from hldm.jepa.text_pairs import read_corpora
from hldm.jepa.train import match_run
from hldm.runs.files import atomic_write
from hldm.runs.identity import measured_once, origin_of, say_other_code, text_fingerprint
from hldm.runs.reports import save_report

WEIGHTS = (0.0, 0.01, 0.1, 1.0)
SPLITS = ("validation", "test")
LEGEND = """\
weight            of the distance between the two views; 0: the baseline; *: best on validation pairs
validation, test  share of pairs whose second view is written right, in every byte and in its end; ±: over seeds
functional        of expressions, share that match the same texts
right alone       test pairs, of all seeds, that it has right and weight 0 has wrong; 0 alone: the other way round
p, McNemar        how likely a split as uneven is, were both as good"""


def compare_matches(records: Sequence[Mapping[str, Any]]) -> Table:
    """Each run but the first against the first, on the same pairs; a record: hldm.jepa.train.match_run and `run`.

    Raises ConfigError where their pairs differ.
    """
    first, *others = records
    lines = []
    for record in others:
        if (record["text"], record["pairs"]) != (first["text"], first["pairs"]):
            raise ConfigError(
                f"{record['run']} and {first['run']} have different pairs: they cannot be compared"
            )
        only_first, only_second, p = mcnemar(first["right"], record["right"])
        lines.append([record["run"], str(only_second), str(only_first), cell(p, ".4f")])
    return Table(["run", "right alone", f"{first['run']} alone", "p, McNemar"], lines)


def run_grid(
    paths: Sequence[Path],
    minutes: float,
    *,
    weights: Sequence[float] = WEIGHTS,
    seeds: int = 1,
    most: int = 0,
    overrides: Sequence[str] = (),
    root: Path = Path("runs"),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and match what is not there yet, one seed after another; returns the results.

    minutes: of CPU time, each;  most: pairs of a split that are matched, 0: all
    Leaves root/<name>-grid/weight-<weight>-seed-<seed>/, by the config's name, and beside them grid.json and grid.md,
    rewritten after each. Raises ValueError or OSError.
    """
    base = load_jepa_config(paths, overrides)
    if base.task != "pairs" or base.pairs.source == "halves":
        raise ConfigError(f"{paths[-1]} has task={base.task}: a grid is of task=pairs, with text and code")
    for weight in weights:
        if not 0 <= weight < math.inf:
            raise ConfigError(f"--weight must be at least 0 and finite, got {weight:g}")
    folder = root / f"{base.name}-grid"
    grid: dict[str, Any] = {"config": [str(path) for path in paths], "name": base.name}
    grid |= {"overrides": list(overrides), "minutes": minutes, "clock": "cpu"}
    rows: list[dict[str, Any]] = []
    todo = [
        (weight, seed)
        for seed in range(base.seed, base.seed + seeds)
        for weight in dict.fromkeys(map(float, weights))
    ]
    for number, (weight, seed) in enumerate(todo, start=1):
        config = _config_of(base, weight, seed, minutes)
        say(f"run {number} of {len(todo)}: {config.name}")
        rows.append(_matched(config, folder, most, say))
        grid["matches"] = rows
        save_report(folder / "grid.json", grid)
        atomic_write(folder / "grid.md", f"{table_of(grid)}\n")
    say_other_code(rows, say)
    return grid


def _config_of(base: JepaConfig, weight: float, seed: int, minutes: float) -> JepaConfig:
    jepa = changed(base.training.jepa, minutes=minutes, steps=10**9)
    return changed(
        base,
        name=f"weight-{weight:g}-seed-{seed}",
        seed=seed,
        objective=changed(base.objective, latent_weight=weight),
        training=changed(base.training, jepa=jepa, clock="cpu"),
    )


def _matched(config: JepaConfig, folder: Path, most: int, say: Callable[[str], None]) -> dict[str, Any]:
    corpora = read_corpora(config)  # grammars draw their pairs by the seed
    run = trained_row(config, folder, corpora, say)
    origin = origin_of(run, text_fingerprint(corpora), "jepa/model/*", STAGES) | {"most": str(most)}

    def work() -> dict[str, Any]:
        found = {"name": config.name, "weight": config.objective.latent_weight, "seed": config.seed}
        return found | {split: match_run(run, split, most) for split in SPLITS}

    return measured_once(folder / config.name / "match.json", origin, work, say)


def table_of(grid: Mapping[str, Any]) -> Table:
    """A line a weight, means over seeds, and the pairs of all seeds that it or the baseline alone has right.

    `*` marks the weight that is best on validation pairs.
    """
    by_weight: dict[float, dict[int, Mapping[str, Any]]] = {}
    for row in grid["matches"]:
        by_weight.setdefault(row["weight"], {})[row["seed"]] = row

    def mean(weight: float, split: str, key: str = "exact") -> float | None:
        values = [row[split][key] for row in by_weight[weight].values() if key in row[split]]
        return sum(values) / len(values) if values else None

    best = max(by_weight, key=lambda weight: mean(weight, "validation") or 0.0)
    lines = []
    for weight, rows in sorted(by_weight.items()):
        exact = torch.tensor([row["test"]["exact"] for row in rows.values()], dtype=torch.float64)
        against = [(rows[seed], by_weight[0.0][seed]) for seed in rows if seed in by_weight.get(0.0, {})]
        right = [[x for pair in against for x in pair[side]["test"]["right"]] for side in (1, 0)]
        only_base, only_here, p = mcnemar(*right)
        compared = bool(weight and against)
        lines.append(
            [
                f"{weight:g}{' *' if weight == best else ''}",
                str(len(rows)),
                cell(mean(weight, "validation"), ".4f"),
                cell(float(exact.mean()), ".4f"),
                cell(float(exact.std()) / math.sqrt(len(exact)) if len(exact) > 1 else None, ".4f"),
                cell(mean(weight, "test", "functional"), ".4f"),
                *([str(only_here), str(only_base), cell(p, ".4f")] if compared else ["-", "-", "-"]),
            ]
        )
    heads = [
        "weight",
        "seeds",
        "validation",
        "test",
        "±",
        "functional",
        "right alone",
        "0 alone",
        "p, McNemar",
    ]
    return Table(heads, lines)
