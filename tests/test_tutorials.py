"""What the tutorials say can be typed works as it stands, with a model that takes seconds in place of minutes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from conftest import ROOT, SMALL

from hldm import cli, plugins

TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARSERS = typer.main.get_command(cli.app).commands


class Block(NamedTuple):
    """Code of a tutorial.

    title: the file it is saved as;  needs: what hldm must have for it;  fails: whether it ends with exit code 2
    """

    language: str
    text: str
    title: str
    needs: str
    fails: bool


def blocks_of(path: Path) -> list[Block]:
    """The code of a tutorial, in order."""
    found = []
    for language, marks, text in BLOCK.findall(path.read_text(encoding="utf-8")):
        title, needs = (re.search(rf'{mark}="([^"]+)"', marks) for mark in ("title", "needs"))
        given = (title[1] if title else "", needs[1] if needs else "")
        found.append(Block(language, text, *given, fails="fails" in marks.split()))
    return found


def is_there(name: str) -> bool:
    """Whether the pipeline has what a block needs, e.g. HLDMPipeline.score."""
    from hldm.generation import pipeline

    owner, _, attribute = name.partition(".")
    return hasattr(getattr(pipeline, owner), attribute)


def test_there_are_three_and_all_their_code_is_run_or_shown():
    assert len(TUTORIALS) >= 3
    for path in TUTORIALS:
        blocks = blocks_of(path)
        assert {block.language for block in blocks} <= {"bash", "python", "text"}
        assert path.read_text(encoding="utf-8").count("\n```") == 2 * len(blocks)
        assert sum(block.language == "bash" for block in blocks) >= 2


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_commands_parse_and_python_compiles(path):
    for block in blocks_of(path):
        if block.language == "python":
            compile(block.text, str(path), "exec")
            continue
        for line in block.text.splitlines():
            if line.startswith("hldm ") and not block.fails:
                name, *words = shlex.split(line)[1:]
                with plugins.scope():  # of --allow-code
                    PARSERS[name].make_context(name, words)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_what_a_tutorial_says_works(path, tmp_path, corpus_path):
    (tmp_path / "configs").mkdir()
    for name, kept in (("tiny", ""), ("tiny-twin", "latent_dim")):
        (tmp_path / f"configs/{name}.yaml").write_text(small_config(name, kept, corpus_path))
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin/hldm"
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hldm "$@"\n')
    shim.chmod(0o755)
    paths = os.pathsep.join((str(tmp_path / "bin"), os.environ["PATH"]))
    environment = {**os.environ, "PATH": paths, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for block in blocks_of(path):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
        elif block.language != "text" and (not block.needs or is_there(block.needs)):
            words = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
            done = subprocess.run(
                [*words, block.text],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                encoding="utf-8",
                errors="replace",  # of a model that has hardly been trained
            )
            assert done.returncode == (2 if block.fails else 0), (block.text, done.stdout, done.stderr)
            if block.fails:
                assert done.stderr.startswith("hldm: ") and done.stderr.count("\n") == 1


def small_config(name: str, kept: str, corpus_path: Path) -> str:
    """A config of the same name that takes seconds; kept: settings that stay, by a part of their key."""
    from hldm.config import changed, load_config, to_yaml

    overrides = [override for override in SMALL if not kept or kept not in override]
    overrides += [f"data.path={corpus_path}", 'data.separator="\\n\\n"']
    config = load_config([ROOT / f"configs/{name}.yaml"], overrides)
    return to_yaml(changed(config, name=""))
