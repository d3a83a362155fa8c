"""An extract of `make torture`: each fault a few times, in processes of their own; docs/reliability.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def figures(tmp_path: Path, faults: str, scale: float) -> dict:
    """What `python -m tests.torture` counts."""
    path = tmp_path / "figures.json"
    options = ["--only", faults, "--scale", str(scale), "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", *options], cwd=ROOT, capture_output=True, text=True
    )
    found = json.loads(path.read_text())["faults"]
    assert done.returncode == int(any(fault["bad"] for fault in found.values())), done.stdout + done.stderr
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("faults", "scale"),
    [
        ("strace,enospc", 0.1),
        pytest.param("fuzz", 0.01, marks=pytest.mark.slow),  # tests/test_hostile.py has some at all times
        pytest.param("files,libraries", 0.05, marks=pytest.mark.slow),
        pytest.param("truncations,flips", 0.05, marks=pytest.mark.slow),
        pytest.param("kill", 0.02, marks=pytest.mark.slow),
        pytest.param("matrix", 0.03, marks=pytest.mark.slow),
        pytest.param("signals", 0.1, marks=pytest.mark.slow),
        pytest.param("settings", 0.03, marks=pytest.mark.slow),
        pytest.param("environment", 0.01, marks=pytest.mark.slow),
    ],
)
def test_a_few_of_each_fault_break_no_promise(tmp_path, faults, scale):
    for name, found in figures(tmp_path, faults, scale).items():
        assert found["bad"] == [], f"{name}: {found['bad']}"
        assert found["survived"] == found["tried"] and (found["tried"] or "skipped" in found["note"])


def test_a_fault_that_nobody_knows_is_refused():
    options = ["--only", "earthquake"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no fault called earthquake" in done.stderr
