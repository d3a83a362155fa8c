"""Writing more than fits in memory is refused in one line, by the command before it imports torch."""

from __future__ import annotations

import pytest
from conftest import ROOT

from hldm.config import ConfigError
from hldm.generation.pipeline import read_pipeline
from tests.training.test_sizes import run_limited


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "a", "--max-chars", "1000000000000"],
        ["--prompt", "a", "--num-samples", "1000000000000"],
        ["--prompt-file", "huge.txt"],
        ["--prompt", "a", "--steps", "1000000000000"],
    ],
)
def test_writing_too_much_is_refused_within_two_seconds_under_a_limit(arguments, trained_run, tmp_path):
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(10**12)  # sparse: takes no disk
    command = [str(ROOT / "generate.py"), "--run", str(trained_run), *arguments]
    code, error, seconds = run_limited(*command, cwd=tmp_path)
    assert (code, error.count("\n")) == (2, 1) and seconds < 2
    assert "of memory, 3." in error or "generation.steps must be at most 10000, got 1000000000000" in error


def test_a_pipeline_refuses_too_much_as_well(trained_run):
    pipeline = read_pipeline(trained_run / "pipeline")
    with pytest.raises(ConfigError, match="1,000,000,000,000 characters"):
        pipeline("a", max_characters=10**12)
