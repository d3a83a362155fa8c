"""Cuts of a text can be seen: tinted, as lengths, and on a page that trusts no text."""

from __future__ import annotations

import json
import re
from functools import partial
from html import unescape
from pathlib import Path
from typing import get_args

import pytest

from hldm.chunking.chunker import TEXT_STRATEGIES
from hldm.chunking.strategies import SEGMENTERS
from hldm.chunking.view import as_json, as_page, as_text, cut_text
from hldm.cli import main
from hldm.config import ChunkingConfig, ConfigError, Strategy
from hldm.training.segmenters import train_for_minutes

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


def test_a_strategy_that_asks_a_model_takes_what_ships_a_run_or_minutes(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--strategy takes fixed, words.*'verse'"):
        cut_text(TEXT, ["verse"], chunking=ChunkingConfig())
    with pytest.raises(FileNotFoundError, match="holds no run"):
        cut_text(TEXT, [], [tmp_path], chunking=ChunkingConfig())
    cuts = cut_text(TEXT, ["entropy"], chunking=ChunkingConfig(), train=partial(train_for_minutes, 1e-4))
    assert b"".join(cuts["entropy"]) == TEXT
    monkeypatch.setattr("hldm.runs.folder.__file__", str(tmp_path / "runs.py"))
    with pytest.raises(FileNotFoundError, match="segmenters/learned is not there: pass --run"):
        cut_text(TEXT, ["learned"], chunking=ChunkingConfig())


@pytest.mark.parametrize("strategy", list(SEGMENTERS))
def test_a_segmenter_that_ships_keeps_to_the_limits_it_is_given(strategy):
    text = b"And the king said to his servants, Let them go in peace. " * 20
    chunking = ChunkingConfig(min_bytes=3, max_bytes=20, target_bytes=8)
    length = [len(chunk) for chunk in cut_text(text, [strategy], chunking=chunking)[strategy]]
    assert (
        min(length[:-1]) >= 3 and max(length) <= 20 and sum(length) / len(length) == pytest.approx(8, rel=0.3)
    )


def test_sentences_are_whole_unless_chunks_are_limited():
    text = b"And the king said to his servants, Go. And they went out."
    limits = ChunkingConfig()
    assert len(cut_text(text, ["sentence"], chunking=limits, whole_bytes=1024)["sentence"]) == 2
    assert len(cut_text(text, ["sentence"], chunking=limits)["sentence"]) > 4


def test_the_command_prints_writes_a_page_and_spares_other_files(tmp_path, capsys, trained_run):
    text, page, other = (tmp_path / name for name in ("text.txt", "page.html", "mine.html"))
    text.write_bytes(TEXT)
    assert (
        main(["chunk", "--text", str(text), "--strategy", "words", "--run", str(trained_run), "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in found] == ["words", "words (small)"]
    assert sum(found[0]["bytes"]) == len(TEXT)
    for words in (["--strategy", "words"], []):  # its own page may be replaced
        assert main(["chunk", "--text", str(text), "--html", str(page), *words]) == 0
        assert capsys.readouterr().out == f"wrote {page}\n"
    assert re.findall(r"<h2>(\w+), [^<]+: ", page.read_text()) == list(get_args(Strategy))
    other.write_text("<p>")
    assert main(["chunk", "--text", str(text), "--html", str(other)]) == 2
    assert main(["chunk", "--text", str(text), "--min-bytes", "20"]) == 2
    assert main(["chunk", "--text", str(Path("/nowhere"))]) == 2
    assert other.read_text() == "<p>"


def test_an_empty_text_is_refused(tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    assert main(["chunk", "--text", str(tmp_path / "empty.txt")]) == 2
    assert "empty" in capsys.readouterr().err
