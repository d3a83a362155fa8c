from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from hldm.config import DataConfig
from hldm.sources.corpora import bible_verse_starts, bible_verses, load_corpora, load_corpus
from hldm.text.corpus import SPLITS, Corpus, make_corpus

DOCUMENTS = [f"document {i}: é and \ufeffmore\n" for i in range(300)]


def documents_of(corpus: Corpus) -> list[str]:
    return [corpus.document(index).tobytes().decode() for index in range(len(corpus))]


def everything(config: DataConfig) -> list[str]:
    return sorted(document for corpus in load_corpora(config).values() for document in documents_of(corpus))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(documents: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({field: document, "n": 1}).encode() + b"\n" for document in documents)


def parquet_bytes(documents: list, field: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({field: documents}), sink)
    return sink.getvalue().to_pybytes()


# ---- the built-in corpus


VERSES = {
    1001001: "At the first God made the heaven and the earth.",
    1043001: (
        "And when the grain which they had got in Egypt was all used up, their father said to them, Go "
        "again and get us a little food."
    ),
    8001016: (
        "But Ruth said, Give up requesting me to go away from you, or to go back without you: for where you"
        " go I will go; and where you take your rest I will take my rest; your people will be my people, "
        "and your God my God."
    ),
    9020042: (
        "And Jonathan said to David, Go in peace, for we two have taken an oath, in the name of the Lord, "
        "saying, The Lord will be between me and you, and between my seed and your seed for ever."
    ),
    19023001: (
        "A Psalm. Of David. The Lord takes care of me as his sheep; I will not be without any good thing."
    ),
    19051001: "To the chief music-maker. A Psalm. Of David.",
    21001002: "All is to no purpose, said the Preacher, all the ways of man are to no purpose.",
    27010019: (
        "And he said to me, O man greatly loved, have no fear: peace be with you, be strong and let your "
        "heart be lifted up. And at his words I became strong, and said, Let my lord say on, for you have "
        "given me strength."
    ),
    40001001: "The book of the generations of Jesus Christ, the son of David, the son of Abraham.",
    43003016: (
        "For God had such love for the world that he gave his only Son, so that whoever has faith in him "
        "may not come to destruction but have eternal life."
    ),
    47013012: "Give one another a holy kiss.",
    66022020: ("He who gives witness to these things says, Truly, I come quickly. Even so come, Lord Jesus."),
    66022021: "The grace of the Lord Jesus be with the saints. So be it.",
}


@pytest.mark.parametrize("verse", VERSES)
def test_a_verse_reads_as_printed(verse):
    assert bible_verses()[verse] == VERSES[verse]


def test_the_bible_is_split_by_whole_books():
    corpora = load_corpora(DataConfig())
    assert [len(corpora[split]) for split in SPLITS] == [1134, 23, 33]
    # the figures of the compressors are for chapters parted by a blank line, with a newline at the end
    for split, characters in {"train": 3_994_732, "validation": 63_953, "test": 118_798}.items():
        assert len("\n\n".join(documents_of(corpora[split])) + "\n") == characters
    assert documents_of(corpora["test"])[0].startswith("Now there came a time, in the days of the judges")
    assert documents_of(corpora["test"])[-1].startswith("Come now, you men of wealth, give yourselves to")
    assert not any("\\" in document or "  " in document for document in documents_of(corpora["train"]))


def test_books_as_documents_hold_the_chapters_in_order():
    chapters, books = (load_corpora(DataConfig(documents=documents)) for documents in ("chapters", "books"))
    assert [len(books[split]) for split in SPLITS] == [58, 4, 4]
    assert all(
        " ".join(documents_of(chapters[split])) == " ".join(documents_of(books[split])) for split in SPLITS
    )
    for document, starts in zip(books["test"], bible_verse_starts("test", "books"), strict=True):
        assert all(document[start - 1] == ord(" ") for start in starts[1:]) and starts[-1] < len(document)


def test_the_fingerprint_tells_documents_apart():
    one, same = make_corpus("a", [b"ab", b"c"]), make_corpus("b", [b"ab", b"", b"c"])
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != make_corpus("a", [b"a", b"bc"]).fingerprint
    assert one.fingerprint != make_corpus("a", [b"ab", b"d"]).fingerprint


# ---- files


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    "name, data",
    [
        ("a.txt", "<|end|>".join(DOCUMENTS).encode()),
        ("a.jsonl", jsonl(DOCUMENTS).replace(b"\n", b"\n\n")),
        ("a.parquet", parquet_bytes(DOCUMENTS)),
    ],
)
def test_every_format_gives_the_documents_byte_for_byte(tmp_path, name, data, ending):
    file = write(tmp_path / (name + ending), data)
    assert everything(DataConfig(path=str(file), separator="<|end|>")) == sorted(DOCUMENTS)


def test_a_folder_is_read_recursively_and_in_order(tmp_path):
    write(tmp_path / "b.jsonl.gz", jsonl(DOCUMENTS[100:200]))
    write(tmp_path / "c" / "deep" / "x.parquet", parquet_bytes(DOCUMENTS[200:]))
    write(tmp_path / "a.txt", "|".join(DOCUMENTS[:100]).encode())
    write(tmp_path / "README.md", b"not read")
    folder = load_corpora(DataConfig(path=str(tmp_path), separator="|"))
    write(tmp_path / "whole" / "all.jsonl", jsonl(DOCUMENTS))
    whole = load_corpora(DataConfig(path=str(tmp_path / "whole")))
    assert all(folder[split].fingerprint == whole[split].fingerprint for split in SPLITS)


def test_a_glob_names_its_files_only(tmp_path):
    for index in range(30):
        write(tmp_path / f"{'even' if index % 2 == 0 else 'odd'}{index}.txt", f"{index} text ".encode() * 20)
    found = "".join(everything(DataConfig(path=str(tmp_path / "even*.txt"))))
    assert "4 text" in found and "5 text" not in found


@pytest.mark.parametrize(
    "name, data, fault",
    [
        ("a.jsonl", jsonl(["x"]) + b'{"text": "broken\n', r"a\.jsonl:2: not a row of JSON"),
        ("a.jsonl", jsonl(["x"]) + b'{"text": "\xff"}\n', r"a\.jsonl:2: not a row of JSON"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1: not a row of JSON"),
        ("a.jsonl", jsonl(["x"]) + b"3\n", r"a\.jsonl:2: expected an object"),
        ("a.jsonl", jsonl(["x"]) + b'{"body": "x", "id": 1}\n', r"a\.jsonl:2: no field 'text'.*body, id"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl:1: field 'text' must be text, got NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: .*surrogate"),
        ("a.jsonl.gz", b"", "holds no text"),
        ("a.parquet", parquet_bytes(["x", None]), r"a\.parquet:2: field 'text' must be text"),
        ("a.parquet", parquet_bytes(["x"], "body"), r"a\.parquet: no column 'text'.*body"),
        ("a.parquet", parquet_bytes(["x"] * 99)[:-40], r"a\.parquet: not a readable parquet file"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"x", "leave nothing for train"),
        ("a.md", b"text", "must end in .txt, .jsonl, .parquet"),
    ],
)
def test_a_fault_is_named_in_one_line(tmp_path, name, data, fault):
    file = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=fault) as error:
        load_corpus(DataConfig(path=str(file)), "train")
    one_line(error)


def test_a_gzip_file_cut_short_is_named(tmp_path):
    file = write(tmp_path / "a.txt.gz", os.urandom(9999))
    file.write_bytes(file.read_bytes()[:-99])
    with pytest.raises(ValueError, match=r"a\.txt\.gz: damaged gzip file") as error:
        load_corpus(DataConfig(path=str(file)), "train")
    one_line(error)


@pytest.mark.parametrize("path", ["missing.txt", "empty", "nothing*.txt"])
def test_where_no_file_is_there_the_path_is_named(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data\.path=") as error:
        load_corpus(DataConfig(path=str(tmp_path / path)), "train")
    one_line(error)


def test_reading_stops_at_max_bytes_between_two_characters(tmp_path):
    file = write(tmp_path / "a.txt", "é".encode() * 5000)
    assert len("".join(everything(DataConfig(path=str(file), max_bytes=2001)))) == 1000
    bomb = write(tmp_path / "b.txt.gz", b" word" * 10_000_000)
    assert len("".join(everything(DataConfig(path=str(bomb), max_bytes=5000)))) == 5000
    write(tmp_path / "c.jsonl", jsonl(["12345678"] * 1000))
    assert len("".join(everything(DataConfig(path=str(tmp_path / "c.jsonl"), max_bytes=804)))) == 804
    assert len(load_corpus(DataConfig(max_bytes=1000), "test").text) == 1000


# ---- splits of files and datasets


def test_adding_documents_moves_none_to_another_split(tmp_path):
    write(tmp_path / "less.jsonl", jsonl(DOCUMENTS[:200]))
    write(tmp_path / "more.jsonl", jsonl(DOCUMENTS))
    less = load_corpora(DataConfig(path=str(tmp_path / "less.jsonl"), held_out=0.1))
    more = load_corpora(DataConfig(path=str(tmp_path / "more.jsonl"), held_out=0.1))
    for split in SPLITS:
        assert documents_of(more[split])[: len(less[split])] == documents_of(less[split])
    assert 0.05 < len(more["test"]) / 300 < 0.15


@pytest.mark.parametrize("border", ["\n", " "])
def test_few_documents_are_split_by_position_at_a_line_or_word(tmp_path, border):
    texts = [border.join(f"{name}{i}" for i in range(1000)) for name in ("one", "two")]
    write(tmp_path / "a.txt", texts[0].encode())
    write(tmp_path / "b.txt", texts[1].encode())
    corpora = load_corpora(DataConfig(path=str(tmp_path), held_out=0.1))
    parts = [documents_of(corpora[split]) for split in SPLITS]
    assert ["".join(pieces) for pieces in zip(*parts, strict=True)] == texts
    for text, validation, test in zip(texts, parts[1], parts[2], strict=True):
        assert validation.startswith(text[:3]) and test.startswith(text[:3])  # whole words
        assert len(test) == pytest.approx(0.1 * len(text), abs=10)
        assert len(validation) == pytest.approx(0.1 * len(text), abs=10)


def test_one_long_word_is_split_between_characters(tmp_path):
    file = write(tmp_path / "a.txt", "世".encode() * 1000)
    assert sum(map(len, everything(DataConfig(path=str(file), held_out=0.1)))) == 1000


def test_reading_a_corpus_needs_no_torch_and_no_datasets():
    code = "import sys; from hldm.sources.corpora import *; load_corpus(DataConfig(), 'test')\n"
    code += "assert not {'torch', 'datasets', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
