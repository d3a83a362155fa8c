"""A folder and a glob of it name the same files, each once, and nothing that nobody meant to train on."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from hldm.config import ConfigError, DataConfig
from hldm.sources.corpora import copies_of_training, corpus_of_file, load_corpora
from hldm.sources.files import matching_files
from hldm.sources.notes import TextNote
from hldm.text.corpus import SPLITS, make_corpus


def names_and_notes(path: str, root: Path) -> tuple[list[str], list[str]]:
    """Files below root that a path names, and what is said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [str(file.relative_to(root)) for file in matching_files(path)]
    assert all("\n" not in str(warning.message) for warning in said)
    return found, [str(warning.message) for warning in said]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three texts among all that may lie beside them."""
    place = tmp_path / "texts"
    for name in (
        *("a.txt", "sub/b.txt", "sub/deep/C.TXT"),
        *(".hidden.txt", "._a.txt", ".git/x.txt", ".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/._a.txt"),
        *("__MACOSX/a.txt", "a.txt~", "#a.txt#", ".a.txt.swp", "a.txt.bak", ".DS_Store", "~$a.txt", "a.swp"),
        *("sub/.cache/y.jsonl", "lost+found/z.txt", "notes.md"),
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"text of {name}\n")
    return place


@pytest.mark.parametrize("glob", ["", "/", "/**", "/**/*", "/*", "/**/*.[tT][xX][tT]"])
def test_a_folder_and_its_glob_name_the_same_texts_and_no_hidden_ones(folder, glob):
    found, said = names_and_notes(f"{folder}{glob}", folder)
    assert found == ["a.txt", "sub/b.txt", "sub/deep/C.TXT"]
    (line,) = said
    assert "read 3 files" in line and "hidden or temporary" in line
    if not glob:
        assert "14 hidden or temporary" in line and "1 with other endings (notes.md)" in line


@pytest.mark.parametrize("glob", ["/.hidden.txt", "/.h*.txt", "/.git/*", "/.*/x.txt"])
def test_what_is_hidden_is_read_where_it_is_asked_for(folder, glob):
    found, _ = names_and_notes(f"{folder}{glob}", folder)
    assert len(found) == 1


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.txt").write_text("text")
    assert names_and_notes(str(tmp_path / ".cache"), tmp_path) == ([".cache/a.txt"], [])


@pytest.mark.parametrize("glob", ["", "/**", "/**/*.txt", "/*"])
def test_links_are_followed_once_and_loops_end(tmp_path, glob):
    place, outside = tmp_path / "texts", tmp_path / "outside"
    for file in (place / "real" / "a.txt", outside / "b.txt", tmp_path / "c.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of {file.name}")
    (place / "aa").symlink_to(place / "real")  # before it by name; the file keeps its own
    (place / "loop").symlink_to(place)
    (place / "real" / "up").symlink_to("..")
    (place / "linked").symlink_to(outside)
    (outside / "back").symlink_to(place)
    (place / "c.txt").symlink_to(tmp_path / "c.txt")
    (place / "again.txt").symlink_to(place / "real" / "a.txt")
    (place / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (place / "itself.txt").symlink_to(place / "itself.txt")
    os.link(place / "real" / "a.txt", place / "real" / "hard.txt")
    os.mkfifo(place / "pipe.txt")
    found, said = names_and_notes(f"{place}{glob}", place)
    assert found == ["c.txt", "linked/b.txt", "real/a.txt"]
    (line,) = said
    for words in (
        "2 links to nothing (gone.txt, itself.txt)",
        "read already",
        "1 not regular files (pipe.txt)",
    ):
        assert words in line


def test_many_links_to_each_other_end(tmp_path):
    """Two links to the folder above would double the paths at every level."""
    for name in "abcdefgh":
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "x.txt").write_text("text")
    for glob in ("", "/**", "/**/x.txt", "/**/**/*"):
        assert names_and_notes(f"{tmp_path}{glob}", tmp_path)[0] == ["x.txt"]


def test_a_folder_deeper_than_python_recurses_is_read(tmp_path):
    deep = tmp_path
    for _ in range(1200):
        deep = deep / "d"
        deep.mkdir()
    (deep / "a.txt").write_text("text")
    try:
        assert len(matching_files(str(tmp_path))) == 1
    finally:  # pytest recurses, too
        (deep / "a.txt").unlink()
        while deep != tmp_path:
            deep.rmdir()
            deep = deep.parent


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pipe.txt", "not a regular file"),
        ("gone.txt", "a link to nothing"),
        ("no.txt", "no such file or folder"),
    ],
)
def test_what_is_no_file_is_said(tmp_path, name, says):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=f"data.path=.*{name}: {says}"):
        matching_files(str(tmp_path / name))


def test_where_all_is_left_out_it_is_said_why(tmp_path):
    (tmp_path / ".a.txt").write_text("text")
    (tmp_path / "b.txt").touch()
    with pytest.raises(
        FileNotFoundError, match=r"left out: 1 empty \(b.txt\), 1 hidden or temporary \(.a.txt\)"
    ):
        matching_files(str(tmp_path))


def test_names_cannot_steer_a_terminal(tmp_path):
    (tmp_path / ".\x1b[2J\n.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    _, (line,) = names_and_notes(str(tmp_path), tmp_path)
    assert "\x1b" not in line and r"\x1b[2J" in line


def test_a_folder_and_its_glob_make_the_same_splits(folder):
    for file in folder.rglob("*.[tT]*"):
        file.write_text(f"{file.name} some words\n" * 300)
    whole, glob = (load_corpora(DataConfig(path=f"{folder}{end}")) for end in ("", "/**/*"))
    assert all(whole[split].fingerprint == glob[split].fingerprint for split in SPLITS)


# ---- what is said about texts


def said_of(tmp_path, data: bytes, name: str = "a.txt", **settings) -> tuple[list[str], int]:
    """Notes of a corpus with many steps' worth of text, and how many documents came out."""
    (tmp_path / name).write_bytes(data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        corpora = load_corpora(
            DataConfig(**{"path": str(tmp_path / name), "lanes": 1, "window_bytes": 8, **settings})
        )
    assert all(warning.category is TextNote for warning in said)
    return [str(warning.message) for warning in said], sum(map(len, corpora.values()))


TEXT = "\n\n".join(f"paragraph {i} of some words" for i in range(300))


@pytest.mark.parametrize("separator", ["\n\n", "\\n\\n", "\r\n\r\n", "\\r\\n\\r\\n"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_blank_lines_part_documents_however_they_are_typed_and_stored(tmp_path, separator, line_end):
    data = TEXT.replace("\n", line_end).encode()
    assert said_of(tmp_path, data, separator=separator) == ([], 300)


def test_a_separator_that_never_occurs_is_said_with_the_documents_that_came_out(tmp_path):
    (line,), count = said_of(tmp_path, TEXT.encode(), separator="<|end|>")
    assert count == 3  # one, split by position
    assert "data.separator='<|end|>' occurs nowhere" in line and "1 plain text file made 1 document;" in line
    data = TEXT.replace("\n\n", "\\newpage")
    assert said_of(tmp_path, data.encode(), separator="\\newpage") == ([], 300)


def test_copies_of_a_document_in_several_splits_are_counted(tmp_path):
    data = "\n\n".join(f"paragraph {i % 100}\nof some words" for i in range(300))
    (line,), _ = said_of(tmp_path, data.encode(), separator="\n\n", held_out=0.1)
    assert "the same documents in several splits" in line and "test documents in train" in line
    assert 'the first: "paragraph' in line and "remove the copies" in line
    crlf = (data + "\n\n").encode() + data.replace("\n", " \r\n").encode()  # other white space, the same text
    assert len(said_of(tmp_path, crlf, separator="\n\n", held_out=0.1)[0]) == 1
    assert said_of(tmp_path, TEXT.encode(), separator="\n\n", held_out=0.1)[0] == []


def test_a_tiny_corpus_is_said_with_the_bytes_that_would_do(tmp_path):
    (line,), _ = said_of(tmp_path, b"some words " * 24, lanes=16, window_bytes=512)
    assert "0.0 steps of data.lanes=16 x data.window_bytes=512" in line and "87,149 bytes" in line


def test_text_beyond_the_limit_is_said(tmp_path):
    (line,), _ = said_of(tmp_path, TEXT.encode(), max_bytes=4000)
    assert "holds more than data.max_bytes=4,000" in line


def test_white_space_alone_is_no_text(tmp_path):
    with pytest.raises(ConfigError, match="no text but white space"):
        said_of(tmp_path, b" \n\t\r\n" * 1000)


@pytest.mark.parametrize("row", [1, 750, 1501, 3000])
@pytest.mark.parametrize("bad", ['{"text": null}', "{"])
def test_a_bad_row_is_treated_the_same_wherever_it_stands(tmp_path, row, bad):
    rows = [f'{{"text": "text {i} of some words"}}' for i in range(3000)]
    rows[row - 1] = bad
    (line,), count = said_of(tmp_path, "\n".join(rows).encode(), "a.jsonl")
    assert count == 2999 and f"left out 1 bad of 3,000 rows; the first: {tmp_path}/a.jsonl:{row}:" in line
    few = [*rows[:9], bad] if row > 9 else rows[:10]
    with pytest.raises(ValueError, match=r"\(bad rows: 1 of the first 10\)"):
        said_of(tmp_path, "\n".join(few).encode(), "a.jsonl")
    with pytest.raises(ValueError, match="bad rows"):  # judged where reading stops, too
        said_of(tmp_path, "\n".join([bad, *rows[1:]]).encode(), "a.jsonl", max_bytes=2000)


def test_documents_that_were_trained_on_are_counted_in_a_split():
    splits = {"train": [b"a b", b"c"], "validation": [b"a  b"], "test": [b"d", b"c\n", b"e"]}
    corpora = {split: make_corpus(split, texts) for split, texts in splits.items()}
    assert [copies_of_training(corpora, split) for split in ("validation", "test")] == [1, 1]


def test_rows_are_not_measured_as_if_they_were_text(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz", "a.PARQUET"):
        (tmp_path / name).write_text('{"text": "a"}\n')
        with pytest.raises(ValueError, match="holds rows, and a text is read as one document"):
            corpus_of_file(tmp_path / name)
