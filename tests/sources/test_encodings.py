"""Whatever a file is called, its text is read or it is said what it holds instead; the same for every use of text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sqlite3
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from hldm import cli
from hldm.cli import evaluate
from hldm.config import DataConfig
from hldm.sources.corpora import load_corpora
from hldm.sources.encodings import read_text, require_utf8
from hldm.text.bytes import MAX_PROMPT_BYTES

TEXT = "Grüße, 世界! Ça va? \ufeff In the middle it stays.\n" * 300
UTF8 = TEXT.encode()


def made_by(make) -> bytes:
    sink = io.BytesIO()
    make(sink)
    return sink.getvalue()


def zipped(sink) -> None:
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.txt", UTF8)


def tarred(sink) -> None:
    with tarfile.open(fileobj=sink, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(UTF8)
        archive.addfile(info, io.BytesIO(UTF8))


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (x)")
    return connection.serialize()


READ = {
    "plain": UTF8,
    "UTF-8 with a mark": b"\xef\xbb\xbf" + UTF8,
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16, big-endian": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "UTF-32": TEXT.encode("utf-32"),
    "UTF-32, big-endian": b"\x00\x00\xfe\xff" + TEXT.encode("utf-32-be"),
    "Windows": TEXT.replace("\n", "\r\n").encode(),
    "Windows, UTF-16": TEXT.replace("\n", "\r\n").encode("utf-16"),
    "an old Mac": TEXT.replace("\n", "\r").encode(),
    "gzip": gzip.compress(UTF8, mtime=0),
    "two gzip members": gzip.compress(UTF8[:999], mtime=0) + gzip.compress(UTF8[999:]),
    "gzip of UTF-16": gzip.compress(TEXT.encode("utf-16"), mtime=0),
}
REFUSED = {
    "Latin-1": ("Grüße aus Köln. " * 40).encode("latin-1"),
    "Latin-1 at the very end": b"plain text, caf\xe9",
    "Latin-1 far in": b"plain text\n" * 200_000 + b"caf\xe9 au lait",
    "Shift-JIS": ("吾輩は猫である。" * 40).encode("shift-jis"),
    "UTF-16 without a mark": TEXT[:6].encode("utf-16-le") * 99,
    "half a UTF-16 character": "é".encode("utf-16") + b"\x00",
    "NUL bytes": b"text and\0nothing" * 99,
    "a NUL far in": b"plain text\n" * 9999 + b"\0",
    "gzip within gzip": gzip.compress(gzip.compress(UTF8), mtime=0),
    "gzip cut short": gzip.compress(UTF8, mtime=0)[:-20],
    "zip": made_by(zipped),
    "tar": made_by(tarred),
    "bzip2": bz2.compress(UTF8),
    "xz": lzma.compress(UTF8),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(range(99)),
    "SQLite": database(),
    "PDF": b"%PDF-1.7\n1 0 obj << /Type /Catalog >>\n" * 20,
    "RTF": b"{\\rtf1\\ansi some words}",
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(99),
    "parquet": made_by(lambda sink: parquet.write_table(pyarrow.table({"text": ["x"] * 9}), sink)),
    "a resource fork": b"\x00\x05\x16\x07" + bytes(80),
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
    "pickle": b"\x80\x04\x95\x00\x00\x00\x00",
}


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
@pytest.mark.parametrize("kind", READ)
def test_text_is_the_same_however_it_is_stored_and_wherever_it_is_used(tmp_path, kind, ending):
    file = tmp_path / f"a{ending}"
    file.write_bytes(READ[kind])
    assert read_text(file, 10**6) == UTF8
    corpora = load_corpora(DataConfig(path=str(file)))
    assert b"".join(corpora[split].text.tobytes() for split in ("train", "validation", "test")) == UTF8


@pytest.mark.parametrize("kind", READ)
def test_rows_are_the_same_however_they_are_stored(tmp_path, kind):
    if kind == "an old Mac":
        return
    rows = READ["plain"].decode()
    lines = "".join(f'{{"text": "{line} "}}\n' for line in rows.splitlines())
    stored = {
        "gzip": gzip.compress(lines.encode(), mtime=0),
        "gzip of UTF-16": gzip.compress(lines.encode("utf-16")),
    }
    data = stored.get(
        kind, lines.encode("utf-16" if "16" in kind else "utf-32" if "32" in kind else "utf-8-sig")
    )
    (tmp_path / "a.jsonl").write_bytes(data)
    corpora = load_corpora(DataConfig(path=str(tmp_path / "a.jsonl")))
    assert sum(map(len, corpora.values())) == 300


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_text_is_refused_in_the_same_line_for_every_use(tmp_path, kind, capsys, refused):
    file = tmp_path / "a.txt"
    file.write_bytes(REFUSED[kind])
    with pytest.raises(ValueError, match=r"a\.txt: ") as error:
        load_corpora(DataConfig(path=str(file)))
    line = str(error.value)
    assert "\n" not in line and len(line) < 300
    with pytest.raises(ValueError) as error:
        read_text(file, 10**7)
    assert str(error.value) == line
    assert line in refused(evaluate(["--text", str(file)]))
    if file.stat().st_size < MAX_PROMPT_BYTES:
        assert line in refused(cli.generate(["--prompt-file", str(file)]))
        assert line in refused(cli.main(["chunk", "--text", str(file), "--strategy", "words"]))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("Latin-1", r"not UTF-8: byte 0xfc in line 1; if it is Latin-1 or Windows-1252, iconv"),
        ("Latin-1 far in", "byte 0xe9 in line 200,001"),
        ("Shift-JIS", "convert it from its own encoding"),
        ("UTF-16 without a mark", "UTF-16 without a byte-order mark: iconv -f UTF-16LE"),
        ("zip", "a zip archive"),
        ("SQLite", "an SQLite database"),
        ("LFS", "git lfs pull"),
        ("gzip cut short", "damaged gzip file"),
    ],
)
def test_the_kind_is_named(tmp_path, kind, says):
    (tmp_path / "a.txt").write_bytes(REFUSED[kind])
    with pytest.raises(ValueError, match=says):
        load_corpora(DataConfig(path=str(tmp_path / "a.txt")))


@pytest.mark.parametrize("kind", ["zip", "SQLite", "UTF-16 without a mark", "NUL bytes", "parquet"])
def test_rows_in_disguise_are_refused(tmp_path, kind):
    for name in ("a.jsonl", "a.parquet") if kind != "parquet" else ("a.jsonl",):
        (tmp_path / name).write_bytes(REFUSED[kind])
        with pytest.raises(ValueError, match=name) as error:
            load_corpora(DataConfig(path=str(tmp_path / name)))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["BZh is not a word", "RIFFs of guitars", "ID3 tags", "GIF87a is a format", "ORCs"]
)
def test_text_that_begins_like_a_binary_file_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read_text(tmp_path / "a.txt", 100).decode() == text


def test_a_pipe_is_read_like_a_file(monkeypatch):
    for kind, data in READ.items():
        pipe = io.BufferedReader(Pipe(data))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
        assert read_text("-", 10**6) == UTF8, kind


class Pipe(io.RawIOBase):
    """Gives a few bytes at a time, and cannot be wound back."""

    def __init__(self, data: bytes):
        self.data = data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        part, self.data = self.data[:7], self.data[7:]
        buffer[: len(part)] = part
        return len(part)


def test_more_than_the_limit_is_refused_however_it_is_packed(tmp_path):
    for data in (b"a" * 1001, gzip.compress(b"a" * 1001, mtime=0), ("a" * 1001).encode("utf-16")):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(ValueError, match="longer than 1,000 bytes"):
            read_text(tmp_path / "a.txt", 1000)


def test_a_character_may_be_cut_only_where_text_was():
    for size in (2**20 - 1, 2**20, 2**20 + 1):
        text = b"a" * (size - 1) + "é".encode()
        require_utf8(text, "a")
        require_utf8(text[:-1], "a", is_cut=True)
        with pytest.raises(ValueError, match="byte 0xc3 in line 1"):
            require_utf8(text[:-1], "a")


@pytest.mark.parametrize("data", [b"", b" \n\t\r\n", b"\xef\xbb\xbf \n", gzip.compress(b"\n\n", mtime=0)])
def test_nothing_but_white_space_is_refused_before_the_model_is_read(tmp_path, data, refused, monkeypatch):
    monkeypatch.setattr("hldm.generation.pipeline.read_pipeline", None)
    (tmp_path / "a.txt").write_bytes(data)
    assert "there is nothing to measure" in refused(evaluate(["--text", str(tmp_path / "a.txt")]))


def test_a_prompt_file_writes_what_the_prompt_writes(tmp_path, capfdbinary):
    prompt = "In the beginning\nGod made é"
    for kind, data in {
        "plain": prompt.encode(),
        "a line": prompt.encode() + b"\n",
        "Windows": b"\xef\xbb\xbf" + prompt.replace("\n", "\r\n").encode() + b"\r\n",
        "UTF-16": (prompt + "\n").encode("utf-16"),
        "gzip": gzip.compress(prompt.encode() + b"\n", mtime=0),
    }.items():
        Path(tmp_path / kind).write_bytes(data)
        assert cli.generate(["--max-chars", "5", "--prompt-file", str(tmp_path / kind)]) == 0
    outs = capfdbinary.readouterr().out
    one = outs[: len(outs) // 5]
    assert one * 5 == outs and one.startswith(prompt.encode())
