"""Writing more than fits in memory is refused in one line, before any of it is allocated."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

from hldm.config import ConfigError
from hldm.generation.pipeline import read_pipeline
from tests.limits import run_limited, seconds_to_start


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "a", "--max-chars", "1000000000000"],
        ["--prompt", "a", "--num-samples", "1000000000000"],
        ["--prompt-file", "huge.txt"],
        ["--prompt", "a", "--prompt", "b", "--max-chars", "10000000000"],
        ["--prompt", "a", "--steps", "1000000000000"],
    ],
)
def test_writing_too_much_is_refused_within_ten_seconds_of_its_start(arguments, trained_run, tmp_path):
    with open(tmp_path / "huge.txt", "wb") as file:
        file.write(b"a" * 2**21)
        file.truncate(10**12)  # sparse: takes no disk
    command = [str(ROOT / "generate.py"), "--run", str(trained_run), *arguments]
    code, error, seconds = run_limited(*command, cwd=tmp_path)
    assert (code, error.count("\n")) == (2, 1) and seconds < seconds_to_start() + 10
    refusals = (
        r"prompts of up to 1 bytes needs about [0-9,.]+ [GT]iB of memory, .* available under ulimit -v: ask for",
        "huge.txt: longer than 1,048,576 bytes",
        r"generation.steps must be at most 10000, got 1000000000000",
    )
    assert any(re.search(refusal, error) for refusal in refusals), error


def test_a_pipeline_refuses_too_much_as_well(trained_run):
    pipeline = read_pipeline(trained_run / "pipeline")
    with pytest.raises(ConfigError, match="1,000,000,000,000 characters"):
        pipeline("a", max_characters=10**12)
    with pytest.raises(ConfigError, match="from 1,000,000,000,000 prompts"):
        pipeline("a", num_return_sequences=10**12)
