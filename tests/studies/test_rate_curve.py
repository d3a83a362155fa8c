"""The curve turns one dial at a time, for equal minutes, and goes on where it was stopped."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from hldm.cli import main
from hldm.config import ConfigError, DataConfig
from hldm.evaluation import evaluate as evaluation
from hldm.sources.corpora import load_corpora
from hldm.studies import rate_curve
from hldm.studies.plots import plot_rate_curve
from hldm.studies.rate_curve import DIALS, points, run_curve, table
from hldm.training import stages

TINY = ROOT / "configs/tiny.yaml"


def test_every_point_differs_from_the_config_in_one_dial_and_takes_the_same_minutes():
    base, *others = points(TINY, 6)
    assert {point.dial for point in others} == set(DIALS) and len({p.name for p in others}) == len(others)
    for point in others:
        key = DIALS[point.dial][0].split(".")
        assert getattr(getattr(point.config, key[0]), key[1]) == point.value
    for point in (base, *others):
        training = point.config.training
        assert training.autoencoder.minutes + training.prior.minutes == pytest.approx(6)


def test_some_dials_can_be_picked_and_unknown_ones_are_refused():
    assert {point.dial for point in points(TINY, 6, ["gamma_0"])} == {"base", "gamma_0"}
    with pytest.raises(ConfigError, match="--only takes gamma_0.*'gamma'"):
        points(TINY, 6, ["gamma"])
    with pytest.raises(ConfigError, match="is a twin"):
        points(ROOT / "configs/tiny-twin.yaml", 6)


@pytest.mark.parametrize("command", ["rate-curve", "chunkers"])
def test_minutes_that_are_none_are_refused(command, capsys):
    assert main([command, "--config", str(TINY), "--minutes", "0"]) == 2
    error = capsys.readouterr().err
    assert "--minutes" in error and error.count("\n") == 1


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Replace training and evaluation; notes the runs that were evaluated."""
    runs: list[str] = []

    def evaluate(run, prompts):
        if len(runs) == 2 and "stop" not in runs:
            runs.append("stop")
            raise KeyboardInterrupt
        runs.append(run.name)
        twin = run.name == "twin"
        bits = {"bound": 1.5, "standard_error": 0.0, "standard_error_text": 0.02}
        reconstruction = None if twin else {"clean": {"byte_accuracy": 0.99}}
        return {
            "bits_per_character": {**bits, "latent": 0.0 if twin else 0.75, "decoder": 0.75},
            "reconstruction": reconstruction,
            "characters_per_chunk": None if twin else 6.0,
            "cost": {"parameters": 10, "train_seconds": 1.0, "train_characters": 5},
        }

    def train(config, *, root):
        (root / config.name).mkdir(parents=True, exist_ok=True)
        return root / config.name

    monkeypatch.setattr(stages, "train_run", train)
    monkeypatch.setattr(evaluation, "evaluate_run", evaluate)
    return runs


@pytest.mark.slow
def test_a_stopped_curve_goes_on_and_measures_nothing_twice(measured, tmp_path):
    options = dict(only=["max_bytes"], root=tmp_path, say=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        run_curve(TINY, 6, **options)
    curve = run_curve(TINY, 6, **options)
    assert measured == ["twin", "base", "stop", "max_bytes-6", "max_bytes-16"]
    saved = json.loads((tmp_path / "tiny-curve/rate-curve.json").read_text())
    assert saved == curve and [p["name"] for p in curve["points"]][:2] == ["twin", "base"]
    # xz on the built-in text, as a program outside this repository measured it: 1.698
    assert curve["compressors"]["xz -9e"] == pytest.approx(1.698, abs=0.01)
    [row] = [row for row in table(curve).rows if row[0] == "base"]
    assert row[1:] == ["1.500", "0.000", "0.750", "50%", "1.00", "99.0%", "6.0", "10"]
    plot_rate_curve(curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_bits_of_compressors_are_those_of_the_text_that_they_were_given(monkeypatch):
    monkeypatch.setattr("lzma.compress", lambda text, filters: text[:9])
    whole = load_corpora(DataConfig())
    assert "zpaq -m5" in rate_curve._compressors(whole)
    part = load_corpora(DataConfig(max_bytes=20_000))
    assert list(rate_curve._compressors(part)) == ["xz -9e"]


def test_points_of_another_text_are_measured_again(measured, tmp_path, monkeypatch):
    monkeypatch.setattr("lzma.compress", lambda text, filters: text[:9])
    said: list[str] = []
    options = dict(only=["max_bytes"], root=tmp_path, say=said.append)
    measured.append("stop")
    run_curve(TINY, 6, **options)
    count = len(measured)
    monkeypatch.setattr(rate_curve, "text_fingerprint", lambda corpora: "7e47" * 16)
    run_curve(TINY, 6, **options)
    assert (
        len(measured) - count == 4 and sum("not 7e477e477e47: measured again" in line for line in said) == 4
    )
