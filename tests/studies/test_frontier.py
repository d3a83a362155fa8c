"""The frontier: twins of the sizes that were asked for, equal minutes, and where a latent model lies to their curve."""

from __future__ import annotations

import json
import math

import pytest
from conftest import ROOT

from hldm.cli import main
from hldm.config import ConfigError
from hldm.runs.location import find_model
from hldm.studies import bench_writing, frontier
from hldm.studies.frontier import (
    SIZES,
    bits_under,
    entries,
    measure_speeds,
    run_frontier,
    table,
)
from hldm.studies.plots import plot_frontier
from hldm.training.twin import numbers

TINY = ROOT / "configs/tiny.yaml"


def test_twins_have_about_the_parameters_of_their_names_and_all_take_the_same_minutes():
    found = entries(TINY, 4)
    twins = {entry.name: numbers(entry.config, "autoencoder") for entry in found if entry.config.is_twin}
    assert list(twins) == [f"twin-{size:g}M" for size in SIZES]
    for size, parameters in zip(SIZES, twins.values(), strict=True):
        assert 0.75 < parameters / (1e6 * size) < 1.25
    for entry in found:
        stages = entry.config.training.autoencoder, entry.config.training.prior
        assert sum(stage.minutes for stage in stages[: 1 if entry.config.is_twin else 2]) == pytest.approx(4)


def test_points_that_decide_get_three_seeds():
    found = entries(TINY, 4, only=["base", "twin-1M"], repeated=["base"])
    assert [(entry.name, entry.seed) for entry in found] == [
        ("twin-1M", 0),
        ("base", 0),
        ("base", 1),
        ("base", 2),
    ]
    assert [entry.config.seed for entry in found] == [0, 0, 1, 2]


def test_unknown_names_are_refused(capsys):
    with pytest.raises(ConfigError, match="--only takes twin-0.1M.*'huge'"):
        entries(TINY, 4, only=["huge"])
    assert main(["frontier", "--config", str(TINY), "--minutes", "4", "--repeat", "huge"]) == 2
    error = capsys.readouterr().err
    assert "--repeat takes" in error and error.count("\n") == 1


def test_a_model_is_compared_with_the_twins_that_are_as_fast():
    twins = [(1000.0, 1.4), (4000.0, 1.6), (2000.0, 1.9)]  # the last is beaten by the second in both
    assert bits_under(2000, 1.45, twins) == pytest.approx(0.05)  # half way, in the logarithm
    assert bits_under(4000, 1.7, twins) == pytest.approx(-0.1)
    assert bits_under(9000, 1.5, twins) == pytest.approx(0.1)  # faster than all: the fastest
    assert bits_under(10, 1.5, twins) == pytest.approx(-0.1)  # slower than all: the best would do
    assert bits_under(10, 1.5, []) is None


@pytest.fixture
def measured(monkeypatch):
    """Replace training and measuring: bits and speed by name."""
    seen = []

    def once(name, config, target, text, measure, say):
        seen.append(name)
        bits = {"bound": 1.5 + 0.01 * config.seed, "standard_error": 0.0, "latent": 0.0, "decoder": 1.5}
        cost = {"parameters": 10, "train_seconds": 1.0, "train_characters": 5_000_000}
        return {**bits, **cost, "origin": {"trained": ""}}

    def speeds(runs):
        one = {str(rows): 1000.0 * rows for rows in frontier.ROWS}
        return {name: {**one, "first_seconds": 0.01} for name in runs}

    monkeypatch.setattr(frontier, "measure_once", once)
    monkeypatch.setattr(frontier, "measure_speeds", speeds)
    monkeypatch.setattr(frontier, "say_other_code", lambda rows, say: None)
    return seen


def test_the_study_is_one_table_and_one_picture(measured, tmp_path):
    names = ["twin-0.5M", "base"]
    (tmp_path / "tiny-frontier").mkdir()
    options = dict(only=names, repeated=["base"], root=tmp_path, say=lambda line: None)
    study = run_frontier(TINY, 4, **options)
    assert measured == ["twin-0.5M-seed-0", "base-seed-0", "base-seed-1", "base-seed-2"]
    assert json.loads((tmp_path / "tiny-frontier/frontier.json").read_text()) == study
    twin, base = study["points"]
    assert base["seeds"] == 3 and base["bound"] == pytest.approx(1.51)
    assert base["deviation"] == pytest.approx(0.01) and base["under_1"] == pytest.approx(-0.01)
    assert twin["under_1"] is None
    assert [row[0] for row in table(study).rows] == names
    plot_frontier(study, tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.slow
def test_trained_models_are_measured_as_they_are(monkeypatch):
    monkeypatch.setattr(frontier, "TURNS", 1)
    monkeypatch.setattr(frontier, "ROWS", (1, 3))
    monkeypatch.setattr(bench_writing, "CHARACTERS_AT_LEAST", 30)
    runs = {name: find_model(name) for name in ("small", "small-twin")}
    found = measure_speeds(runs)
    for speeds in found.values():
        assert set(speeds) == {"1", "3", "first_seconds"}
        assert all(0 < value < math.inf for value in speeds.values())
