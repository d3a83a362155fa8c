"""One process beside several: what each one measures, the ratio over turns, and launches that fail in one line."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import ROOT

from hldm.cli import main
from hldm.config import ConfigError, to_yaml
from hldm.studies import bench_processes


@pytest.fixture
def small(small_config, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(to_yaml(small_config))
    return path


def test_a_process_measures_stage_one_with_its_share_of_the_threads(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_processes, "time_steps", lambda stages, steps: {"stage one": {"steps": steps}})
    before, target = torch.get_num_threads(), tmp_path / "found.json"
    try:
        bench_processes.main([str(small), "3", "2", str(target)])
    finally:
        torch.set_num_threads(before)
    assert json.loads(target.read_text()) == {"steps": 3, "processes": 1, "threads": 2, "device": "cpu"}


def test_turns_alternate_and_the_ratio_is_the_median_over_turns(small_config, monkeypatch):
    speeds = {False: iter([10.0, 20.0, 40.0]), True: iter([30.0, 20.0, 80.0])}
    started = []

    def run(launcher, path, steps):
        launched = "--config_file" in launcher
        started.append(launched)
        speed = next(speeds[launched])
        return {
            "characters_per_second": speed,
            "characters_per_second_best": speed + 1,
            "seconds_per_step": 1 / speed,
            "processes": 1 + launched,
            "threads": 2 - launched,
            "device": "cpu",
        }

    monkeypatch.setattr(bench_processes, "_run", run)
    found = bench_processes.measure(small_config, 5, ROOT / bench_processes.TWO_PROCESSES)
    assert started == [False, True] * 3
    assert found["launched"]["ratio_to_one"] == 2 and found["one process"]["ratio_to_one"] == 1
    assert found["launched"]["characters_per_second"] == 30
    assert found["launched"]["characters_per_second_best"] == 81
    processes, threads = bench_processes.report(found).rows[:2]
    assert (processes[1:], threads[1:]) == (["1", "2"], ["2", "1"])


def test_a_launch_that_fails_is_told_by_its_own_line(small):
    with pytest.raises(ConfigError, match="failed: hldm: .*--bytes"):
        code = (
            "import sys; print('hldm: --bytes', file=sys.stderr); print('more', file=sys.stderr); sys.exit(2)"
        )
        bench_processes._run([sys.executable, "-c", code], small, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "processes", "--launch", "missing.yaml"], "missing.yaml"),
        (["--only", "training", "--launch", "missing.yaml"], "pass both"),
    ],
)
def test_a_launch_file_must_be_there_and_be_used(small, capsys, arguments, says):
    assert main(["bench", "--config", str(small), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.slow
def test_two_processes_are_launched_and_measured_beside_one(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_processes, "TURNS", 1)
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "bench.json"
    launch = ["--launch", str(ROOT / bench_processes.TWO_PROCESSES)]
    arguments = [
        "--config",
        str(small),
        "--only",
        "processes",
        *launch,
        "--steps",
        "2",
        "--json",
        str(target),
    ]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["bench", *arguments]) == 0
    found = json.loads(target.read_text())["processes"]
    assert (found["one process"]["processes"], found["launched"]["processes"]) == (1, 2)
    assert found["launched"]["characters_per_second"] > 0
    assert "over one process" in capsys.readouterr().out
