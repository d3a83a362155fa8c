"""The documentation's links lead somewhere, and the site that `make docs` builds has every page and loads nothing."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from conftest import ROOT

from hldm import cli
from hldm.chunking.chunker import make_chunker
from hldm.config import ChunkingConfig

PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), ROOT / "CONTRIBUTING.md"])
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_and_a_page_has_a_title(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    outside_code = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(outside_code):
        assert re.match(r"https?://", target) or (path.parent / target).exists(), target


def commands(group: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command of the command line by its whole name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*above, name))
        else:
            yield " ".join((*above, name)), command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


def test_the_page_of_commands_names_each_and_its_examples_parse():
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `([a-z -]+)` \|", text, re.MULTILINE)) == sorted(COMMANDS)
    shown = set()
    for line in re.findall(r"^hldm (.+)$", text, re.MULTILINE):
        words = shlex.split(line)
        name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        shown.add(name)
        COMMANDS[name].make_context(name, words[len(name.split()) :])
    assert shown == set(COMMANDS)


def test_the_glossary_is_in_the_code():
    """What it gives as a name in the code is there, and what it gives as a setting is one."""
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    source = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("hldm/**/*.py"))
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| **")]
    assert len(rows) >= 20
    for row in rows:
        for name in re.findall(r"`([A-Za-z_.]+)`", row[2]):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", source) or (ROOT / name).exists(), name


def test_the_picture_is_what_its_script_draws_and_its_chunks_are_those_of_words():
    module = runpy.run_path(str(ROOT / "docs/figures/data_flow.py"))
    chunks = [chunk.encode() for chunk in (*module["CHUNKS"], module["NEXT"])]
    starts = make_chunker(ChunkingConfig()).chunk_start(b"".join(chunks) + b" my son")
    assert starts.nonzero()[0].tolist() == [len(b"".join(chunks[:n])) for n in range(len(chunks) + 1)]
    for theme, colors in module["THEMES"].items():
        drawn = module["draw"](colors)
        ElementTree.fromstring(drawn)
        path = ROOT / f"docs/figures/data-flow-{theme}.svg"
        assert path.read_text(encoding="utf-8") == drawn, "run python docs/figures/data_flow.py"


@pytest.mark.parametrize("page", ["README.md", "docs/concepts.md"])
def test_pictures_are_there_in_both_versions(page):
    path = ROOT / page
    named = re.findall(r'(?:src|srcset)="([^"]+)"', path.read_text(encoding="utf-8"))
    assert len(named) == 2 and all((path.parent / name).is_file() for name in named)
    hooks = (ROOT / "docs/site/hooks.py").read_text(encoding="utf-8")
    pattern = re.search(r"PICTURE = re.compile\((.+?)^\)", hooks, re.DOTALL | re.MULTILINE)
    assert pattern and re.search(ast.literal_eval(f"({pattern[1]})"), path.read_text(encoding="utf-8"))


def test_every_own_part_that_is_documented_is_there():
    text = (ROOT / "docs/own_part.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(hldm(?:\.[a-z_]+)+)\.([A-Z]\w+)`", text):
        module = ROOT / (name[0].replace(".", "/") + ".py")
        assert f"class {name[1]}" in module.read_text(encoding="utf-8")


@pytest.fixture
def clone(tmp_path) -> Path:
    """What the site is built of."""
    pytest.importorskip("mkdocstrings", reason="make docs installs it")
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "examples", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    room = tmp_path / "hldm/chunking"  # all of them take half a minute
    shutil.copytree(ROOT / "hldm/chunking", room)
    (tmp_path / "hldm/__init__.py").touch()
    for page in tmp_path.glob("docs/**/*.md"):  # what pages link to outside of docs/ is only to be there
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target, original = (page.parent / link).resolve(), ROOT / page.parent.relative_to(tmp_path) / link
            if original.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif original.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
                if target.suffix == ".py":
                    (target.parent / "__init__.py").touch()
    return tmp_path


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_the_site_has_every_page_and_fails_on_a_broken_link(clone):
    (clone / "docs/reliability.md").unlink()  # a page that is not there is not missed, but for links to it
    (clone / "docs/later.md").write_text("# Later\n\nSee [own parts](own_part.md).\n")
    for path in (clone / "README.md", *clone.glob("*.md"), *clone.glob("docs/*.md")):
        path.write_text(re.sub(r"\((docs/)?reliability\.md", r"(\1later.md", path.read_text()))
    done = build(clone)
    assert done.returncode == 0, done.stderr
    site = clone / "build/site"
    index = (site / "index.html").read_text()
    for page in ("later.html", "own_part.html", "tutorials/1_own_text.html", "examples/own_chunker.html"):
        assert (site / page).is_file() and f'href="{page}"' in index
    assert "hldm.chunking.own.ChunkingStrategy" in (site / "api/chunking.html").read_text()
    assert not re.search(r'<(script|img)[^>]+src="https?:', index)
    (clone / "docs/later.md").write_text("# Later\n\nSee [nothing](nowhere.md).\n")
    done = build(clone)
    assert done.returncode != 0 and "nowhere.md" in done.stderr
