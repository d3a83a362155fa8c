"""Minimal pairs: the file read, the better text counted where it is likelier, the interval that of the book."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from hldm import cli
from hldm.generation.pipeline import HLDMPipeline
from hldm.studies.minimal_pairs import judge_pairs, read_pairs, table, wilson

ROWS = [
    {"good": "the king said", "bad": "king the said", "term": "order"},
    {"sentence_good": "he goes", "sentence_bad": "he go", "term": "agreement"},
    {"good": "of stone", "bad": "of stone", "term": "order"},
]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    return path


def test_wilsons_interval_is_that_of_the_book():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="1 of 0"):
        wilson(1, 0)


def test_accuracy_counts_the_pairs_whose_better_text_is_likelier(file, saved_pipeline):
    found = judge_pairs(file, str(saved_pipeline), draws=4)
    texts = [pair[:2] for pair in read_pairs(file, "term")]
    scores = [
        HLDMPipeline.from_pretrained(saved_pipeline).score(list(pair), draws=4, ends_document=False)
        for pair in texts
    ]
    right = [float(a.bits < b.bits) for a, b in scores]
    right[2] = 0.5  # alike, so neither is likelier, whatever rounding says
    groups = {row["name"]: row for row in found["groups"]}
    assert groups["all"]["accuracy"] == pytest.approx(np.mean(right)) and groups["all"]["pairs"] == 3
    assert groups["order"]["accuracy"] == pytest.approx((right[0] + right[2]) / 2)
    assert [row[0] for row in table(found).rows] == ["agreement", "order", "all"]


def test_the_command_prints_and_saves(file, saved_pipeline, tmp_path, capsys):
    arguments = ["pairs", "--file", str(file), "--run", str(saved_pipeline), "--draws", "2"]
    assert cli.main([*arguments, "--json", str(tmp_path / "found.json"), "--samples", "2"]) == 0
    assert "| all " in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["samples"] == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no pairs"),
        ("{", ":1: not a row of JSON"),
        ('{"good": "a", "bad": "b"}\n{"good": "a"}', ":2: a row must hold two texts"),
        ("[1]", ":1: a row must hold two texts"),
        ('{"good": "", "bad": "b"}', ":1: a row must hold two texts"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, saved_pipeline, refused, text, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    assert says in refused(cli.main(["pairs", "--file", str(path), "--run", str(saved_pipeline)]))
