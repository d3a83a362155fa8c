"""What README.md says can be typed can be typed; the map of the files is complete."""

from __future__ import annotations

import re
import shlex

import pytest
import typer
from conftest import ROOT

from hldm import cli
from hldm.config import load_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = r"(?:train_autoencoder|train_diffusion|generate)\.py|-m hldm\.evaluation"
TYPED = re.findall(rf"^(?:python|accelerate launch.*?) ((?:{NAMES})(?: .*)?)$|^hldm (.+)$", README, re.M)
PARSERS = typer.main.get_command(cli.app).commands
NAMED = {
    "train_autoencoder.py": "train-autoencoder",
    "train_diffusion.py": "train-diffusion",
    "generate.py": "generate",
    "hldm.evaluation": "evaluate",
}


@pytest.mark.parametrize("command", [script or command for script, command in TYPED])
def test_commands_parse_and_name_files_that_exist(command):
    name, *words = shlex.split(command.removeprefix("-m "), comments=True)
    asked = PARSERS[NAMED.get(name, name)].make_context(name, words).params
    if config := asked.get("config"):
        files = config if isinstance(config, list | tuple) else [config]
        load_config(
            [ROOT / file if file.parent.name else file for file in files], asked.get("overrides") or []
        )


def test_there_are_commands_and_links_lead_somewhere():
    assert len(TYPED) >= 10
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_map_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[a-z_0-9]+", page.split("## Files")[1].split("## ")[0]))
    modules = {path.stem for path in (ROOT / "hldm").rglob("*.py") if not path.stem.startswith("__")}
    assert modules <= named
