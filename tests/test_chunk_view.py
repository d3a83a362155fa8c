"""Cuts of a text can be seen: tinted, as lengths, and on a page that trusts no text."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest

from hldm.chunk_view import as_json, as_page, as_text, cut_text
from hldm.chunking import TEXT_STRATEGIES
from hldm.cli import main
from hldm.config import ChunkingConfig, ConfigError

TEXT = 'He said: "<b>Go & come</b>".\n\nThen 世界 \x1b[31m.'.encode()


def test_every_form_of_the_cuts_holds_the_whole_text():
    cuts = cut_text(TEXT, list(TEXT_STRATEGIES), chunking=ChunkingConfig())
    for chunks, found in zip(cuts.values(), json.loads(as_json(cuts)), strict=True):
        assert b"".join(chunks) == TEXT and found["bytes"] == [len(chunk) for chunk in chunks]
    safe = TEXT.decode().replace("\x1b", "\\x1b")
    page = as_page(cuts)
    shown = [unescape(re.sub("</?span>", "", body)) for body in re.findall("<p>(.*?)</p>", page, re.DOTALL)]
    assert shown == [safe] * len(cuts) and "<b>" not in page and "\x1b" not in page
    coloured = as_text(cuts, colour=True)
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured).count(safe) == len(cuts)
    assert as_text(cuts, colour=False).replace("|", "").count(safe) == len(cuts)


def test_a_strategy_that_asks_a_model_takes_a_run_or_minutes(tmp_path):
    with pytest.raises(ConfigError, match="learned asks a model: pass a --run"):
        cut_text(TEXT, ["words", "learned"], chunking=ChunkingConfig())
    with pytest.raises(ConfigError, match="--strategy takes fixed, words.*'verse'"):
        cut_text(TEXT, ["verse"], chunking=ChunkingConfig())
    with pytest.raises(FileNotFoundError, match="holds no run"):
        cut_text(TEXT, [], [tmp_path], chunking=ChunkingConfig())
    cuts = cut_text(TEXT, ["entropy"], chunking=ChunkingConfig(), minutes=1e-4)
    assert b"".join(cuts["entropy"]) == TEXT


def test_the_command_prints_writes_a_page_and_spares_other_files(tmp_path, capsys, trained_run):
    text, page, other = (tmp_path / name for name in ("text.txt", "page.html", "mine.html"))
    text.write_bytes(TEXT)
    assert (
        main(["chunk", "--text", str(text), "--strategy", "words", "--run", str(trained_run), "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in found] == ["words", "words (small)"]
    assert sum(found[0]["bytes"]) == len(TEXT)
    for _ in range(2):  # its own page may be replaced
        assert main(["chunk", "--text", str(text), "--html", str(page)]) == 0
    assert page.read_text().count("<h2>") == len(TEXT_STRATEGIES)
    other.write_text("<p>")
    assert main(["chunk", "--text", str(text), "--html", str(other)]) == 2
    assert main(["chunk", "--text", str(text), "--min-bytes", "20"]) == 2
    assert main(["chunk", "--text", str(Path("/nowhere"))]) == 2
    assert other.read_text() == "<p>"
