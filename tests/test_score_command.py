"""`hldm score`: prints what `HLDMPipeline.score` gives, and what `hldm evaluate` says of the same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hldm import cli
from hldm.evaluation.evaluate import evaluate_run
from hldm.generation.pipeline import HLDMPipeline
from hldm.runs.progress import END_TERM


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_it_prints_bits_and_errors_of_each_text(saved_pipeline, capsys):
    Path("two.txt").write_text("And the king said\n\nLet us go up\n")
    arguments = ["score", "--run", str(saved_pipeline), "--text", "two.txt", "--prefix", "And ", "--json"]
    assert cli.main([*arguments, "--lines", "--prompt", "x"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["text"] for record in records] == ["And the king said", "Let us go up", "x"]
    scores = HLDMPipeline.from_pretrained(saved_pipeline).score(
        [record["text"] for record in records], "And "
    )
    pairs = zip(records, scores, strict=True)
    assert records == [{"text": record["text"], **score.as_dict()} for record, score in pairs]
    assert cli.main([*arguments[:-1], "--samples", "4"]) == 0
    head, _, row, _, *legend = capsys.readouterr().out.splitlines()
    columns = [name.strip() for name in head.split("|")[4:-1]]
    assert columns == ["±", "bits/char", "decoder", "latent", "end", "importance", "its ±"]
    assert [line.split("  ")[0] for line in legend] == ["bits", *columns]  # each column is explained
    assert "an upper bound on -log2 p" in legend[0] and legend[5].endswith(END_TERM)
    assert "importance" in head and row.startswith("| two.txt")


def test_a_file_costs_what_evaluate_says(trained_run, capsys):
    Path("one.txt").write_text("And the king said, Let us go up to the town.\n" * 40)
    assert cli.main(["score", "--run", str(trained_run), "--text", "one.txt", "--seed", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    evaluation = evaluate_run(trained_run, text=Path("one.txt"), draws=8, seed=5, prompts=0)
    bits = evaluation["bits_per_character"]
    assert found["bits_per_character"] == pytest.approx(bits["bound"], rel=1e-6)
    assert found["latent"] / found["characters"] == pytest.approx(bits["latent"], rel=1e-6)
    assert found["standard_error"] / found["characters"] == pytest.approx(bits["standard_error"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", "x", "--run", "nowhere"], "is no folder here"),
        ([], "no text given"),
        (["--prompt", ""], "texts[0] is empty"),
        (["--text", "blank.txt"], "nothing but white space"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--prompt", "x", "--lines"], "--lines is about --text"),
        (["--prompt", "x", "--draws", "3"], "draws must be even"),
    ],
)
def test_bad_input_ends_in_one_line(saved_pipeline, refused, arguments, told):
    Path("blank.txt").write_text(" \n")
    run = [] if "--run" in arguments else ["--run", str(saved_pipeline)]
    assert told in refused(cli.main(["score", *run, *arguments]))
