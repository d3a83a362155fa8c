"""Weights and seeds on pairs in one go: matched once each, compared with weight 0 pair by pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from jepa_small import SMALL

from hldm import cli
from hldm.config import ConfigError
from hldm.jepa.grid import compare_matches, table_of

PAIRS = ["task=pairs", "objective.option=latents", "objective.distance=cosine", "pairs.source=sums"]
ARGUMENTS = [str(ROOT / "configs/jepa-tiny.yaml"), *SMALL, *PAIRS, "pairs.count=300", "name=sums"]


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_and_compares_with_weight_zero(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["grid", "--config", *ARGUMENTS, "--minutes", "0.005", "--most", "5"]
    assert cli.jepa([*command, "--weight", "0"]) == 0
    done = Path("runs/sums-grid/weight-0-seed-0")
    kept = [(path, path.stat().st_mtime_ns) for path in (done / "match.json", done / "jepa/totals.json")]
    capsys.readouterr()
    assert cli.jepa([*command, "--weight", "0", "--weight", "0.5", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "| 0.5 " in out and "p, McNemar" in out and "reusing runs/sums-grid/weight-0-seed-0/jepa" in out
    assert [
        (path, path.stat().st_mtime_ns) for path in (done / "match.json", done / "jepa/totals.json")
    ] == kept
    grid = json.loads(Path("runs/sums-grid/grid.json").read_text())
    assert [(row["weight"], row["seed"]) for row in grid["matches"]] == [(0, 0), (0.5, 0), (0, 1), (0.5, 1)]
    assert all(len(row["test"]["right"]) == 5 for row in grid["matches"])
    assert Path("runs/sums-grid/grid.md").read_text() == f"{table_of(grid)}\n"
    match = ["match", "--most", "5"]
    runs = [
        ["--run", f"runs/sums-grid/weight-{weight}-seed-{seed}"]
        for weight, seed in ((0, 0), (0.5, 0), (0, 1))
    ]
    assert cli.jepa([*match, *runs[0], *runs[1]]) == 0
    assert "weight-0-seed-0 alone" in capsys.readouterr().out
    assert cli.jepa([*match, *runs[0], *runs[2]]) == 2  # another seed draws other pairs
    assert "have different pairs" in capsys.readouterr().err


def test_what_cannot_be_matched_is_refused_in_one_line(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    command = ["grid", "--config", str(ROOT / "configs/jepa-tiny.yaml"), "--minutes", "1"]
    assert "has task=chunks" in refused(cli.jepa(command))
    command = ["grid", "--config", *ARGUMENTS, "--minutes", "1", "--weight=-1"]
    assert "--weight must be at least 0" in refused(cli.jepa(command))
    assert not Path("runs").exists()


def row(weight: float, seed: int, right: list[bool], validation: float) -> dict:
    exact = sum(right) / len(right)
    return {
        "weight": weight,
        "seed": seed,
        "test": {"exact": exact, "right": right},
        "validation": {"exact": validation},
    }


def test_pairs_of_all_seeds_are_compared_seed_by_seed():
    yes, no = [True] * 4, [False] * 4
    rows = [row(0, 0, no, 0.1), row(0, 1, yes, 0.1), row(0.1, 0, yes, 0.2), row(0.1, 1, yes, 0.2)]
    base, other = table_of({"matches": rows}).rows
    assert base[:4] == ["0", "2", "0.1000", "0.5000"] and base[-1] == "-"
    # four pairs that only the second has right, none that only the first has: p = 2 / 2^4
    assert other[0] == "0.1 *" and other[4] == "0.0000" and other[-3:] == ["4", "0", "0.1250"]


def test_runs_are_compared_on_the_same_pairs_alone():
    first = {"run": "a", "text": "x", "pairs": 2, "right": [True, False]}
    [line] = compare_matches([first, {**first, "run": "b", "right": [False, True]}]).rows
    assert line == ["b", "1", "1", "1.0000"]
    with pytest.raises(ConfigError, match="b and a have different pairs"):
        compare_matches([first, {**first, "run": "b", "text": "y"}])
