"""What is read and how it is split, in one line; the same note once a command."""

from __future__ import annotations

import pytest
from conftest import ROOT

from hldm.config import DataConfig, load_config
from hldm.sources.corpora import is_split_by_document, load_corpora
from hldm.sources.notes import TextNote, each_once, is_new, note
from hldm.sources.splits import describe_splits
from hldm.text.bytes import count_characters


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("\n\n".join(f"Die Größe der {number}. Stadt. " * 9 for number in range(40)))
    return path


def test_whole_documents_or_their_ends_are_held_out_and_that_is_said(text):
    for separator in ("\n\n", ""):
        config = DataConfig(path=str(text), separator=separator, held_out=0.1)
        corpora = load_corpora(config)
        counts = {split: count_characters(corpus.text.tobytes()) for split, corpus in corpora.items()}
        line = describe_splits("some.txt", config, corpora)
        for count in counts.values():
            assert f"{count:,} (" in line
        kept = len(corpora["validation"]), len(corpora["test"])
        assert is_split_by_document(corpora, config.held_out) == bool(separator)
        if separator:
            assert line.startswith(f"text: some.txt, 40 documents, {sum(counts.values()):,} characters: ")
            assert line.endswith(f"; {kept[0]} and {kept[1]} whole documents are held out")
        else:
            assert "some.txt, 1 document, " in line and line.endswith(
                "; validation and test text are the end of the text"
            )


def test_few_documents_each_give_their_end(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("And it came about in those days. " * 30)
    config = DataConfig(path=str(tmp_path), held_out=0.1)
    line = describe_splits("two", config, load_corpora(config))
    assert line.startswith("text: two, 2 documents, ") and "the end of each document" in line


def test_of_the_built_in_text_whole_books():
    config = load_config(ROOT / "configs/tiny.yaml").data
    line = describe_splits("the Bible", config, load_corpora(config))
    assert "(2.8%) for the test; whole books are held out" in line


def test_a_note_is_given_once_a_command_and_again_in_the_next(recwarn):
    for _ in range(2):
        with each_once():
            assert is_new("a line") and not is_new("a line")
            note("twice the same")
            note("twice the same")
    note("outside")
    note("outside")
    said = [str(warning.message) for warning in recwarn if warning.category is TextNote]
    assert said == ["twice the same"] * 2 + ["outside"] * 2
