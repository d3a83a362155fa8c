"""What README.md says can be typed can be typed, and its map of the files is complete."""

from __future__ import annotations

import re
import shlex
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from hldm import cli
from hldm.chunking.chunker import Chunker
from hldm.config import load_config
from hldm.evaluation import evaluate as evaluation

README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = r"(?:train_autoencoder|train_diffusion|generate)\.py|-m hldm\.evaluation"
COMMANDS = re.findall(rf"^(?:python|accelerate launch.*?) ((?:{NAMES}) .*)$", README, re.M)
PARSERS = {
    "train_autoencoder.py": lambda: cli._training_parser("autoencoder"),
    "train_diffusion.py": lambda: cli._training_parser("prior"),
    "generate.py": cli._generation_parser,
    "hldm.evaluation": evaluation._parser,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse_and_name_files_that_exist(command):
    words = shlex.split(command.removeprefix("-m "), comments=True)
    arguments = PARSERS[words[0]]().parse_intermixed_args(words[1:])
    for config in getattr(arguments, "config", None) or []:
        load_config([ROOT / config], arguments.overrides)


def test_there_are_commands_and_links_lead_somewhere():
    assert len(COMMANDS) >= 4
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_strategy_that_is_shown_cuts_lines():
    block = re.search(r"```python\n(class LinesChunker.*?)\n\n\nTEXT_STRATEGIES", README, re.S)
    assert block is not None
    names: dict[str, Any] = {"Chunker": Chunker, "np": np}
    exec(block[1], names)
    starts = names["LinesChunker"](1, 20).chunk_start(b"one\ntwo\n\nthree")
    assert np.flatnonzero(starts).tolist() == [0, 4, 8, 9]


def test_the_map_names_every_module():
    modules = {path.name for path in (ROOT / "hldm").glob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"(\w+\.py)", README.split("## Files")[1].split("## ")[0]))
    assert modules <= named
