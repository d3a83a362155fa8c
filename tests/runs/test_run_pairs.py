"""A model and its twin stay a pair under the overrides of a command line."""

from __future__ import annotations

import pytest
from conftest import ROOT

from hldm.cli import main
from hldm.config import ConfigError, load_config
from hldm.runs.pairs import load_pair
from hldm.studies.league import entries
from hldm.studies.rate_curve import DIALS, points

TINY = ROOT / "configs/tiny.yaml"


def test_overrides_hold_for_both_but_for_what_the_twin_lacks():
    given = ["data.lanes=8", "autoencoder={latent_dim: 6, encoder: {heads: 2}}", "chunking.strategy=space"]
    model, twin = load_pair(TINY, [*given, "logging.trackers=[a, 'b']", 'data.separator="\\n"', "seed=3"])
    assert [c.data.lanes for c in (model, twin)] == [8, 8] and [c.seed for c in (model, twin)] == [3, 3]
    assert [c.autoencoder.latent_dim for c in (model, twin)] == [6, 0]
    assert [c.autoencoder.encoder.heads for c in (model, twin)] == [2, 2]
    assert [c.logging.trackers for c in (model, twin)] == [("a", "b"), ("a", "b")]
    assert [c.data.separator for c in (model, twin)] == ["\n", "\n"]
    assert model.chunking.strategy == "space"
    assert twin.chunking == load_config([TINY.with_name("tiny-twin.yaml")]).chunking


def test_minutes_of_both_stages_are_those_of_the_twins_one():
    model, twin = load_pair(TINY, ["training.prior.minutes=1.5"])
    training = model.training
    assert (training.autoencoder.minutes, training.prior.minutes) == (2.7, 1.5)
    assert twin.training.autoencoder.minutes == pytest.approx(4.2)
    steps = [
        f"training.{stage}.{limit}"
        for stage in ("autoencoder", "prior")
        for limit in ("steps=7", "minutes=0")
    ]
    _, twin = load_pair(TINY, steps)
    assert (twin.training.autoencoder.steps, twin.training.autoencoder.minutes) == (7, 0)


@pytest.mark.parametrize(
    ("config", "overrides", "says"),
    [
        ("tiny-twin.yaml", [], "tiny-twin.yaml is a twin"),
        ("tiny.yaml", ["autoencoder.latent_dim=0"], "tiny.yaml is a twin"),
        ("tiny.yaml", ["data.lane=8"], "command line: unknown key 'data.lane'"),
        ("tiny.yaml", ["data.lanes"], "expected key=value"),
    ],
)
def test_what_is_no_pair_is_refused(config, overrides, says):
    with pytest.raises(ConfigError, match=says):
        load_pair(ROOT / "configs" / config, overrides)


def test_a_twin_with_latents_is_none(tmp_path):
    for name in ("a.yaml", "a-twin.yaml"):
        (tmp_path / name).write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"a-twin.yaml has latents \(autoencoder.latent_dim=4\): no twin"):
        load_pair(tmp_path / "a.yaml")


def test_a_text_that_only_one_config_names_is_read_by_both_when_it_is_given(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {path: x}\n")
    (tmp_path / "a-twin.yaml").write_text("autoencoder: {latent_dim: 0}\n")
    with pytest.raises(ConfigError, match="both must read the same text"):
        load_pair(tmp_path / "a.yaml")
    model, twin = load_pair(tmp_path / "a.yaml", ["data.path=y"])
    assert model.data == twin.data


def test_studies_vary_the_config_as_it_is_overridden():
    given = ["data.lanes=8", "autoencoder.latent_dim=8"]
    found = points(TINY, 6, overrides=given)
    assert {point.config.data.lanes for point in found} == {8}
    assert "latent_dim-8" not in {point.name for point in found}  # the base itself
    others = {p.config.autoencoder.latent_dim for p in found if p.dial not in ("base", "latent_dim")}
    assert others == {8} and {point.dial for point in found} == {"base", *DIALS}
    [entry] = entries(TINY, 6, ["fixed"], [6], overrides=[*given, "chunking.min_bytes=1"])
    assert (entry.config.data.lanes, entry.config.autoencoder.latent_dim) == (8, 8)
    assert entry.config.chunking.min_bytes == 6  # an entry's own


@pytest.mark.parametrize("command", ["rate-curve", "chunkers"])
def test_a_study_takes_overrides_and_a_name(command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    asked: dict[str, object] = {}

    def run(path, minutes, **options):
        asked.update(options)
        raise ConfigError("enough")

    monkeypatch.setattr("hldm.studies.rate_curve.run_curve", run)
    monkeypatch.setattr("hldm.studies.league.run_league", run)
    assert main([command, "--config", str(TINY), "--minutes", "1", "--name", "mine", "data.lanes=8"]) == 2
    assert asked["overrides"] == ["data.lanes=8", "name=mine"]
