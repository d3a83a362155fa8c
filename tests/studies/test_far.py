"""`hldm far`: ways of seeking earlier chunks side by side, on held-out text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hldm import cli
from hldm.generation.pyramid import NEAREST


def test_a_wider_beam_looks_at_more_and_all_at_the_most(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["far", "--run", str(trained_run), "--beam", "1", "--beam", "1000", "--draws", "1"]
    assert cli.main([*arguments, "--json", "far.json"]) == 0
    assert f"the nearest {NEAREST} chunks" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(Path("far.json").read_text())["rows"]}
    assert list(rows) == ["nearest", "pyramid, 1", "pyramid, 1000", "all"]
    assert rows["nearest"]["compared"] <= rows["pyramid, 1"]["compared"] <= rows["pyramid, 1000"]["compared"]
    # a beam that opens every block finds what comparing with all does
    assert rows["pyramid, 1000"]["saved"]["bits"] == pytest.approx(rows["all"]["saved"]["bits"], abs=1e-4)
    assert rows["nearest"]["beyond"]["bits"] == 0
