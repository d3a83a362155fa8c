"""The league asks the same of every chunking strategy, at equal lengths, and goes on where it was stopped."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from hldm.chunking.chunker import make_chunker
from hldm.cli import main
from hldm.config import ConfigError, stage_training, to_dict
from hldm.sources.corpora import bible_verse_starts, load_corpus
from hldm.studies import league
from hldm.studies.corruptions import CORRUPTIONS
from hldm.studies.league import STRATEGIES, entries, measure, run_league, table
from hldm.studies.plots import plot_league
from hldm.training.stages import train_run

TINY = ROOT / "configs/tiny.yaml"


@pytest.mark.slow
def test_every_strategy_has_its_length_and_the_same_minutes():
    found = entries(TINY, 6)
    assert [entry.strategy for entry in found] == 2 * list(STRATEGIES)
    corpus = load_corpus(found[0].config.data, "validation")
    documents = [corpus.document(index) for index in range(0, len(corpus), 4)]
    for entry in found:
        training, chunking = entry.config.training, entry.config.chunking
        assert training.autoencoder.minutes + training.prior.minutes == pytest.approx(6)
        if chunking.needs_segmenter:
            assert chunking.target_bytes == entry.target and chunking.min_bytes == entry.target * 2 / 3
        else:
            starts = make_chunker(chunking).chunk_starts(documents)
            assert len(starts) / starts.sum() == pytest.approx(entry.target, rel=0.1), entry.name


def test_a_convolution_reads_the_fixed_chunks_of_its_own_entry_alone():
    found = {entry.name: entry.config for entry in entries(TINY, 6, ["fixed", "strided"], [6])}
    assert found["strided-6"].chunking == found["fixed-6"].chunking
    pooling = [found[name].autoencoder.pooling for name in ("fixed-6", "strided-6")]
    assert pooling == ["mean", "strided"]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="--only takes fixed, words.*'verse'"):
        entries(TINY, 6, ["verse"])
    with pytest.raises(ConfigError, match="--targets must lie in 2..4096, got 1"):
        entries(TINY, 6, targets=[1])
    with pytest.raises(ConfigError, match="is a twin"):
        entries(ROOT / "configs/tiny-twin.yaml", 6)


def test_verses_start_after_a_space_of_the_built_in_text():
    corpus = load_corpus(entries(TINY, 1, ["words"], [6])[0].config.data, "test")
    verses = bible_verse_starts("test")
    assert len(verses) == len(corpus)
    for index, places in enumerate(verses):
        text = corpus.document(index)
        assert places[0] == 0 and (text[places[1:] - 1] == ord(" ")).all() and places[-1] < len(text)


def test_a_trained_run_gives_every_figure(trained_run):
    found = measure(trained_run)
    assert found["borders"]["word"]["precision"] > 0.5 and found["borders"].get("verse") is None
    assert set(found["robustness"]) == {"clean", *CORRUPTIONS}
    assert 0 <= found["written_agreement"] <= 1 and found["latents_per_second"] > 0
    assert 0 < found["ends"] < found["decoder"]


BITS = {"bound": 1.5, "standard_error": 0.0, "standard_error_text": 0.02, "latent": 0.5, "decoder": 1.0}
ROBUSTNESS = {"clean": 1.5, "typos": 2.0, "case": 1.75, "spaces": 1.7}
FIGURES = {"reconstruction": 0.9, "training_characters_per_second": 9e3, "robustness": ROBUSTNESS}


def pretend_to_train(config, *, root):
    """Leave what a league reads of a run beside its figures."""
    folder = root / config.name / "autoencoder"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))
    return root / config.name


def test_a_stopped_league_goes_on_and_measures_nothing_twice(monkeypatch, tmp_path):
    measured: list[str] = []

    def fake_measure(run):
        if len(measured) == 2 and "stop" not in measured:
            measured.append("stop")
            raise KeyboardInterrupt
        measured.append(run.name)
        return {**BITS, **FIGURES}

    monkeypatch.setattr("hldm.training.stages.train_run", pretend_to_train)
    monkeypatch.setattr(league, "measure", fake_measure)
    options = dict(only=["words", "gate"], targets=[6], root=tmp_path, say=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        run_league(TINY, 6, **options)
    found = run_league(TINY, 6, **options)
    assert measured == ["twin", "words-6", "stop", "gate-6"]
    assert json.loads((tmp_path / "tiny-league/league.json").read_text()) == found
    [row] = [row for row in table(found).rows if row[0] == "gate-6"]
    assert row[1:7] == ["1.500", "0.000", "0.500", "1.000", "-", "90.0%"]
    assert (tmp_path / "tiny-league/league.md").read_text() == f"{table(found)}\n"
    plot_league(found, tmp_path / "league.png")
    assert (tmp_path / "league.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def rows_after(monkeypatch, tmp_path):
    """Pretend to train and measure one strategy; returns the league's rows and what was said."""
    monkeypatch.setattr("hldm.training.stages.train_run", pretend_to_train)
    monkeypatch.setattr(league, "measure", lambda run: {**BITS, **FIGURES})

    def rows(strategy: str, minutes: float = 6, config: Path = TINY) -> tuple[list[str], list[str]]:
        said: list[str] = []
        found = run_league(config, minutes, only=[strategy], targets=[6], root=tmp_path, say=said.append)
        return [row["name"] for row in found["chunkers"]], [line for line in said if "left out" in line]

    return rows


def test_rows_of_earlier_calls_stay_if_their_minutes_are_the_same(rows_after):
    assert rows_after("fixed") == (["fixed-6", "twin"], [])
    assert rows_after("gate") == (["fixed-6", "gate-6", "twin"], [])
    rows, said = rows_after("strided", minutes=3)  # the twin was trained anew: pretended, here
    assert rows == ["strided-6", "twin"] and len(said) == 2 and "training.prior.minutes" in said[0]


def test_rows_of_other_settings_text_or_code_are_left_out_by_name(rows_after, monkeypatch, tmp_path):
    folder = tmp_path / "tiny-league"
    rows_after("fixed")
    for suffix in ("", "-twin"):
        text = TINY.with_name(f"tiny{suffix}.yaml").read_text()
        (tmp_path / f"tiny{suffix}.yaml").write_text(f"{text}\nseed: 5\n")
    rows, said = rows_after("gate", config=tmp_path / "tiny.yaml")
    assert rows == ["gate-6", "twin"] and said == [
        f"{folder / 'fixed-6'} is left out: other settings of seed"
    ]
    monkeypatch.setattr("hldm.studies.league.text_fingerprint", lambda corpora: "7e47" * 16)
    rows, said = rows_after("words")
    assert "fixed-6" not in rows and "text" in said[0] and "not 7e477e477e47" in said[0]
    monkeypatch.undo()
    monkeypatch.setattr("hldm.studies.league.code_fingerprint", lambda: "c0de" * 16)
    monkeypatch.setattr("hldm.training.stages.train_run", pretend_to_train)
    monkeypatch.setattr(league, "measure", lambda run: {**BITS, **FIGURES})
    rows, said = rows_after("strided")
    assert "fixed-6" not in rows and "code" in said[0] and "not c0dec0dec0de" in said[0]


def test_a_twin_of_another_text_is_refused(tmp_path):
    for suffix, more in (("", ""), ("-twin", "data: {max_bytes: 100000}\n")):
        text = TINY.with_name(f"tiny{suffix}.yaml").read_text()
        (tmp_path / f"tiny{suffix}.yaml").write_text(f"{text}\n{more}")
    with pytest.raises(
        ConfigError, match=r"tiny.yaml has data.max_bytes=1000000000, .*tiny-twin.yaml has 100000"
    ):
        run_league(tmp_path / "tiny.yaml", 6, root=tmp_path)


def test_a_run_of_other_minutes_is_no_entry(trained_run, small_config, tmp_path):
    shutil.copytree(trained_run, tmp_path / "small")
    assert train_run(small_config, root=tmp_path) == tmp_path / "small"
    longer = stage_training(small_config, "prior", steps=13)
    with pytest.raises(ValueError, match=r"started with other settings \(training.prior.steps 12 -> 13\)"):
        train_run(longer, root=tmp_path)


def test_a_stage_that_was_killed_before_its_first_checkpoint_starts_anew(
    trained_run, small_config, tmp_path, capsys
):
    shutil.copytree(trained_run / "autoencoder", tmp_path / "small" / "autoencoder")
    (tmp_path / "small/autoencoder/totals.json").unlink()
    shutil.rmtree(tmp_path / "small/autoencoder/checkpoints")
    train_run(small_config, root=tmp_path)
    assert "resuming" in capsys.readouterr().out
    logged = map(json.loads, (tmp_path / "small/autoencoder/metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in logged if "learning_rate" in line] == list(
        range(1, 13)
    )  # others are notes


def test_the_command_leaves_a_report_a_table_and_a_figure(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hldm.training.stages.train_run", pretend_to_train)
    monkeypatch.setattr(league, "measure", lambda run: {**BITS, **FIGURES})
    asked = ["chunkers", "--config", str(TINY), "--minutes", "6", "--only", "fixed", "--targets", "6"]
    assert main(asked) == 0
    assert re.search(r"\| fixed-6 +\| +1\.500 \|", capsys.readouterr().out)
    left = {path.name for path in (tmp_path / "runs/tiny-league").iterdir() if path.is_file()}
    assert left == {"league.json", "league.md", "league.png", "league.svg", "league.pdf"}
