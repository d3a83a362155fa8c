"""The demo trains what is not there, goes on with what was begun, and reuses what is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from hldm import cli, plugins
from hldm.commands import training
from hldm.evaluation import evaluate as evaluation
from hldm.runs import reports
from hldm.training import stages


@pytest.fixture
def trained(monkeypatch, tmp_path) -> list[tuple[str, str, bool]]:
    """Replace training, evaluation and writing by notes of what was asked for: (stage, run, resume)."""
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[str, str, bool]] = []

    def note(stage: str):
        def train(
            config, *, resume: bool = False, root: Path = Path("runs"), part=None, validation=None
        ) -> Path:
            calls.append((stage, config.name, resume))
            return root / config.name

        return train

    monkeypatch.setattr(stages, "train_autoencoder", note("autoencoder"))
    monkeypatch.setattr(stages, "train_diffusion", note("prior"))
    monkeypatch.setattr(evaluation, "evaluate_run", lambda folder: {"run": folder.name})
    monkeypatch.setattr(reports, "save_report", lambda path, columns: None)
    monkeypatch.setattr(training, "compare", lambda columns: f"table of {', '.join(columns)}")
    monkeypatch.setattr(training, "_write_samples", lambda config, folder: print(f"text of {folder}"))
    return calls


def test_the_demo_trains_both_stages_and_the_twin(trained, capsys):
    training.demo(config=ROOT / "configs/tiny.yaml")
    assert trained == [
        ("autoencoder", "demo", False),
        ("prior", "demo", False),
        ("autoencoder", "demo-twin", False),
    ]
    out = capsys.readouterr().out
    assert "table of model, twin" in out and f"text of {Path('runs/demo')}" in out


def test_the_demo_goes_on_with_what_was_begun_and_reuses_what_is_done(trained, capsys):
    done, begun = Path("runs/mine/autoencoder"), Path("runs/mine/prior")
    done.mkdir(parents=True)
    (done / "totals.json").write_text(json.dumps({"steps": 9, "seconds": 90.0, "characters": 9}))
    (begun / "checkpoints").mkdir(parents=True)
    training.demo(config=ROOT / "configs/tiny.yaml", name="mine")
    assert trained == [("prior", "mine", True), ("autoencoder", "mine-twin", False)]
    assert f"reusing {done}, trained in 1.5 minutes (remove it to train again)" in capsys.readouterr().out


def test_a_config_without_a_twin_is_refused_before_anything_is_trained(trained, capsys):
    Path("lone.yaml").write_text("seed: 1\n")
    assert cli.main(["demo", "--config", "lone.yaml"]) == 2
    error = capsys.readouterr().err
    assert "lone-twin.yaml" in error and error.count("\n") == 1 and trained == []


def test_the_demo_takes_any_setting_for_model_and_twin(trained, capsys, monkeypatch):
    planned = []
    monkeypatch.setattr("hldm.training.sizes.require_room", lambda config, stage: planned.append(config))
    asked = ["demo", "--config", str(ROOT / "configs/tiny.yaml")]
    assert cli.main([*asked, "data.lanes=8", "name=mine"]) == 0
    assert {config.data.lanes for config in planned} == {8}
    assert trained == [
        ("autoencoder", "mine", False),
        ("prior", "mine", False),
        ("autoencoder", "mine-twin", False),
    ]
    assert cli.main([*asked, "autoencoder.latent_dim=0"]) == 2
    assert "is a twin" in capsys.readouterr().err


def test_a_demo_with_an_own_part_says_how_to_write_with_it(trained, capsys, monkeypatch):
    monkeypatch.setattr("hldm.training.sizes.require_room", lambda config, stage: None)
    with plugins.scope():
        training.demo(config=ROOT / "configs/tiny.yaml", overrides=["chunking.strategy=mine:Mine"])
    assert "--run runs/demo --allow-code --prompt" in capsys.readouterr().out
