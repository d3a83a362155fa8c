"""The bench of layers: every part is measured beside what it is compared with, and told."""

from __future__ import annotations

import json

import pytest

from hldm.cli import main
from hldm.kernels.library import without_kernels
from hldm.studies import bench_layers


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name in ("SCANS", "LAYERS", "ATTENTION"):
        monkeypatch.setattr(bench_layers, name, ((2, 40, 16),))


def test_every_part_is_measured_with_and_without_kernels(tmp_path, capsys):
    target = tmp_path / "layers.json"
    assert main(["bench", "--layers", "--steps", "2", "--json", str(target)]) == 0
    told = capsys.readouterr().out
    found = json.loads(target.read_text())
    for part, against in (
        ("scan", "stream"),
        ("RG-LRU", "transformers"),
        ("attention", "dense"),
    ):
        assert f"{part} " in told
        for ways in found[part].values():
            for figures in ways.values():
                assert figures[against]["times_faster"] == 1
                assert all(0 < f["ms_least"] <= f["ms_median"] for f in figures.values())
    with without_kernels():
        plain = bench_layers.time_scan((2, 40, 16), repeats=1)
    assert list(plain["forward"]) == ["stream", "scan"]


def test_config_and_layers_exclude_each_other(capsys):
    for arguments in ([], ["--layers", "--config", "small.yaml"]):
        assert main(["bench", *arguments]) == 2
        assert "--config FILE, or --layers" in capsys.readouterr().err
