"""The judges tell text from noise, and are sure of nothing that they cannot know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hldm import cli
from hldm.config import changed
from hldm.studies.judge import NGram, judge_run, table
from hldm.training.stages import train_run

TEXT = b"the king said to the people, and the people went to the house of the king. " * 30


def test_an_ngram_model_gives_every_history_a_distribution():
    model = NGram(TEXT, order=4)
    for history in (b"the kin", b"zzz", b"", b"t"):
        total = sum(2 ** -model.bits(history + bytes([byte]), begin=len(history)) for byte in range(256))
        assert total == pytest.approx(1)


def test_it_prefers_what_it_has_read_and_pays_eight_bits_for_what_it_cannot_guess():
    model = NGram(TEXT)
    assert model.bits(b"the people said") < model.bits(b"eht elpoep dias") < model.bits(b"\x01\x02\x03" * 5)
    assert NGram(b"").bits(b"abc") == 24
    # what comes before is paid for by nobody
    assert model.bits(b"the king", begin=4) == pytest.approx(model.bits(b"the king") - model.bits(b"the "))


@pytest.fixture(scope="module")
def twin(tmp_path_factory, corpus_path) -> Path:
    from conftest import ROOT, SMALL

    from hldm.config import load_config

    overrides = [*(o for o in SMALL if "latent_dim" not in o), f"data.path={corpus_path}"]
    config = load_config([ROOT / "configs/tiny-twin.yaml"], [*overrides, 'data.separator="\\n\\n"'])
    return train_run(changed(config, name="twin"), root=tmp_path_factory.mktemp("twin"))


@pytest.mark.slow
def test_true_text_stands_beside_the_model_the_twin_and_every_variation(trained_run, twin, tmp_path):
    found = judge_run(
        trained_run,
        judge=Path(shutil.copytree(twin, tmp_path / "judge")),
        twin=twin,
        vary=["steps"],
        prompts=2,
        max_characters=60,
        say=lambda line: None,
    )
    judged = found["judged"]
    assert list(judged)[:3] == ["true text", "twin", "model"] and "steps 64" in judged
    true, model = judged["true text"], judged["model"]
    assert true["ngram_bits"] < model["ngram_bits"]  # twelve steps of training write noise
    assert all(row["judge_bits"] > 0 for row in judged.values()) and true["copied"] == 0
    shown = table(found)
    assert [row[0] for row in shown.rows] == list(judged) and "n-gram bits" in shown.head


def test_the_command_writes_json_and_refuses_what_it_cannot_do(trained_run, twin, tmp_path, capsys):
    run, path = str(trained_run), str(tmp_path / "judge.json")
    small = ["--prompts", "1", "--max-characters", "50"]
    assert cli.main(["judge", "--run", run, *small, "--json", path]) == 0
    assert "model" in json.loads(Path(path).read_text())["judged"]
    capsys.readouterr()
    for arguments, says in (
        (["--run", run, "--vary", "colour"], "--vary takes steps"),
        (["--run", str(twin), "--vary", "steps"], "is a twin"),
        (["--run", run, "--prompts", "0"], "--prompts of at least 1"),
        (["--run", run, "--json", str(trained_run)], "not a regular file"),
    ):
        assert cli.main(["judge", *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_a_judge_is_a_twin_that_wrote_none_of_it(trained_run, twin):
    with pytest.raises(ValueError, match="is no twin"):
        judge_run(trained_run, judge=trained_run, prompts=1)
    with pytest.raises(ValueError, match="its own writing"):
        judge_run(trained_run, judge=twin, twin=twin, prompts=1)
