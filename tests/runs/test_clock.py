"""What training's minutes count."""

from __future__ import annotations

import time
from pathlib import Path

from hldm.runs.clock import clock_named
from hldm.studies.league import entries

TINY = Path(__file__).parent.parent.parent / "configs" / "tiny.yaml"


def test_the_cpu_clock_stands_still_while_nothing_is_computed():
    wall, cpu = clock_named("wall"), clock_named("cpu")
    before = wall(), cpu()
    time.sleep(0.2)
    assert wall() - before[0] >= 0.2
    assert cpu() - before[1] < 0.1


def test_a_league_can_be_run_by_the_cpu_clock():
    for entry in entries(TINY, 6, ["words"], clock="cpu"):
        assert entry.config.training.clock == "cpu"
