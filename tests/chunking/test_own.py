"""A chunking strategy of one's own: what it must provide is checked when it is loaded, and it cuts like any other."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from hldm import plugins
from hldm.chunking.chunker import TEXT_STRATEGIES, make_chunker
from hldm.chunking.own import PROBE, OwnChunker, check_mark
from hldm.cli import main
from hldm.config import ChunkingConfig, ConfigError
from hldm.sources.notes import TextNote

NUMBERS = itertools.count()
OPENING = "import numpy as np\n\nclass Mine:\n    def __init__(self, min_bytes, max_bytes):\n        pass\n"
EXAMPLE = "clauses:ClauseChunker"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_allowed", set())


@pytest.fixture
def example(monkeypatch) -> ChunkingConfig:
    """Settings that name the chunker of examples/, which is on the path and may run."""
    monkeypatch.syspath_prepend(ROOT / "examples/own_chunker")
    plugins.allow([EXAMPLE])
    return ChunkingConfig(strategy=EXAMPLE, min_bytes=2, max_bytes=40)


def own(body: str, opening: str = OPENING) -> str:
    """A module with this in it, in the working directory; its class as module:Class, which may run."""
    name = f"own_chunker_{next(NUMBERS)}"  # a module of one name is imported once
    Path(f"{name}.py").write_text(opening + body)
    plugins.allow([f"{name}:Mine"])
    return f"{name}:Mine"


def borders(expression: str, before: str = "pass") -> str:
    """A chunker whose borders are an expression of text."""
    return own(f"    def borders(self, text):\n        {before}\n        return {expression}\n")


def cut(strategy: str, text: bytes, min_bytes: int = 1, max_bytes: int = 12) -> list[bytes]:
    chunker = make_chunker(ChunkingConfig(strategy=strategy, min_bytes=min_bytes, max_bytes=max_bytes))
    places = [*np.flatnonzero(chunker.chunk_start(text)).tolist(), len(text)]
    return [text[begin:end] for begin, end in zip(places, places[1:], strict=False)]


def test_it_cuts_where_it_says_within_the_limits_and_never_inside_a_character():
    after_a = borders("np.frombuffer(b'.' + text[:-1], np.uint8) == ord('a')")
    assert cut(after_a, b"banana split") == [b"ba", b"na", b"na", b" split"]
    assert cut(after_a, b"banana split", min_bytes=3, max_bytes=4) == [b"bana", b"na s", b"plit"]
    everywhere = borders("[True] * len(text)")
    assert cut(everywhere, "aé世".encode()) == [b"a", "é".encode(), "世".encode()]
    assert cut(everywhere, b"") == []


@pytest.mark.parametrize("strategy", [*TEXT_STRATEGIES, EXAMPLE])
def test_it_may_do_what_ours_do_and_passes_the_checks(strategy, example, monkeypatch):
    if strategy in TEXT_STRATEGIES:  # as someone's own
        cls = TEXT_STRATEGIES[strategy]
        strategy = f"{cls.__module__}:{cls.__name__}"
        plugins.allow([strategy])
    assert b"".join(cut(strategy, PROBE, max_bytes=40)) == PROBE


def test_the_example_cuts_at_clauses(example):
    text = b"In the beginning, God created (so it says): heaven."
    assert cut(EXAMPLE, text, max_bytes=40) == [
        b"In the beginning,",
        b" God created (so it says):",
        b" heaven.",
    ]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("    pass\n", "lacks borders: see hldm.chunking.own.ChunkingStrategy"),
        (
            "    def borders(self, text):\n        return np.zeros(len(text))\n",
            "one bool a byte, bool (290,), got float64",
        ),
        ("    def borders(self, text):\n        return np.zeros(3, bool)\n", "got bool (3,)"),
        (
            "    def borders(self, text):\n        return [len(text) > 100] * len(text)\n",
            "depend on no later byte",
        ),
        (
            "    calls = 0\n    def borders(self, text):\n        self.calls += 1\n"
            "        return [self.calls % 2 == 0] * len(text)\n",
            "must say the same of the same text",
        ),
        (
            "    def borders(self, text):\n        return 1 / 0\n",
            "failed with ZeroDivisionError: division by zero (",
        ),
    ],
)
def test_what_a_model_could_not_rely_on_is_refused_in_one_line(body, says):
    name = own(body)
    with pytest.raises(ConfigError) as error:
        make_chunker(ChunkingConfig(strategy=name))
    assert f"chunking.strategy={name}" in str(error.value) and says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_that_takes_no_limits_is_refused():
    with pytest.raises(ConfigError, match=r"Mine\(min_bytes, max_bytes\) failed with TypeError"):
        make_chunker(ChunkingConfig(strategy=own("    def borders(self, text): ...\n", "class Mine:\n")))


def test_a_model_refuses_other_chunks_and_says_where_the_source_has_changed(example):
    chunker = OwnChunker(EXAMPLE, 2, 40)
    check_mark(chunker, "")
    check_mark(chunker, chunker.mark)
    done, source = chunker.mark.split("-")
    with pytest.warns(TextNote, match="its source has changed"):
        check_mark(chunker, f"{done}-{source[::-1]}")
    with pytest.raises(ValueError, match="trained on chunks of another chunking.strategy=clauses"):
        check_mark(chunker, f"{done[::-1]}-{source}")


def test_the_command_that_shows_cuts_takes_it_by_name(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples/own_chunker")
    Path("text").write_text("one, two; three")
    asked = ["chunk", "--text", "text", "--min-bytes", "1", "--strategy", EXAMPLE, "--strategy", "words"]
    assert main(asked) == 0
    assert "one,| two;| three" in capsys.readouterr().out
    assert main([*asked[:-1], "verse"]) == 2
    assert "phrase or module:Class, got 'verse'" in capsys.readouterr().err
