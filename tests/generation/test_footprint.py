"""Writing more than fits in memory is refused in one line, before any of it is allocated."""

from __future__ import annotations

import re

import pytest

from hldm.config import ConfigError
from hldm.generation.pipeline import read_pipeline
from tests.limits import refused_under_limit

MEMORY = (
    r"prompts of up to 1 bytes needs about [0-9,.]+ [GT]iB of memory, .* available under ulimit -v: ask for"
)
TOO_MUCH = {  # what is asked for -> what is said
    "--prompt a --max-chars 1000000000000": MEMORY,
    "--prompt a --num-samples 1000000000000": MEMORY,
    "--prompt-file huge.txt": "huge.txt: longer than 1,048,576 bytes",
    "--prompt a --prompt b --max-chars 10000000000": MEMORY,
    "--prompt a --steps 1000000000000": r"generation.steps must be at most 10000, got 1000000000000",
}


def test_writing_too_much_is_refused_within_ten_seconds_of_its_start(trained_run, tmp_path):
    with open(tmp_path / "huge.txt", "wb") as file:
        file.write(b"a" * 2**21)
        file.truncate(10**12)  # sparse: takes no disk
    commands = [f"generate --run {trained_run} {asked}" for asked in TOO_MUCH]
    ends = refused_under_limit(*commands, cwd=tmp_path)
    for end, (asked, says) in zip(ends, TOO_MUCH.items(), strict=True):
        assert end.code == 2 and re.search(says, end.line) and end.seconds < 10, (asked, end)


def test_a_pipeline_refuses_too_much_as_well(trained_run):
    pipeline = read_pipeline(trained_run / "pipeline")
    with pytest.raises(ConfigError, match="1,000,000,000,000 characters"):
        pipeline("a", max_characters=10**12)
    with pytest.raises(ConfigError, match="from 1,000,000,000,000 prompts"):
        pipeline("a", num_return_sequences=10**12)
