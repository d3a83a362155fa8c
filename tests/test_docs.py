"""The documentation's links lead somewhere, and the site that `make docs` builds has every page and loads nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), ROOT / "CONTRIBUTING.md"])
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_and_a_page_has_a_title(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    outside_code = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(outside_code):
        assert re.match(r"https?://", target) or (path.parent / target).exists(), target


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
    return tmp_path


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_the_site_has_every_page_and_fails_on_a_broken_link(clone):
    (clone / "docs/reliability.md").unlink()  # a page that is not there is not missed, but for links to it
    (clone / "docs/later.md").write_text("# Later\n\nSee [own parts](own_part.md).\n")
    for path in (clone / "README.md", *clone.glob("*.md"), *clone.glob("docs/*.md")):
        path.write_text(path.read_text().replace("(docs/reliability.md)", "(docs/later.md)"))
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
