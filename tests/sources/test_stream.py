"""A stream reads every document once a pass, in parts that can be entered anywhere, and goes on from its cursor."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from hldm.config import ConfigError, DataConfig, changed
from hldm.sources import shards, stream
from hldm.sources.corpora import load_corpora
from hldm.sources.shards import open_source
from hldm.sources.stream import Cursor, Reader, split_of


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts and pieces of a few hundred bytes, so that a test crosses many of their borders."""
    monkeypatch.setattr(shards, "LEAST_SHARD", 700)
    for module in (shards, stream):
        monkeypatch.setattr(module, "DOCUMENT_BYTES", 1500)
        monkeypatch.setattr(module, "NEAR", 200)


def texts(count: int = 300, seed: int = 0) -> list[str]:
    """Different documents of 5 to 400 characters, some of several bytes."""
    random = np.random.default_rng(seed)
    words = ["Wort", "été", "word", "ß", "終わり", "line\nbreak"]
    return [
        f"{number} " + " ".join(random.choice(words, size=random.integers(1, 60))) for number in range(count)
    ]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    """Several of them in a text of some KB."""
    monkeypatch.setattr("hldm.sources.stream.SHUFFLE_BYTES", 3000)


def write(folder: Path, kind: str, documents: list[str]) -> DataConfig:
    """Files of a kind with these documents, and how they are read."""
    folder.mkdir(exist_ok=True)
    parts = [documents[:40], documents[40:45], documents[45:]]
    for number, part in enumerate(parts):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in part)
        path = folder / f"part-{number}"
        if kind == "jsonl":
            path.with_suffix(".jsonl").write_text(rows)
        elif kind == "jsonl.gz":
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(rows.encode()))
        elif kind == "txt":
            path.with_suffix(".txt").write_text("\n\n".join(part))
        elif kind == "crlf":
            path.with_suffix(".txt").write_bytes("\n\n".join(part).replace("\n", "\r\n").encode())
        elif kind == "utf-16":
            path.with_suffix(".txt").write_text("\n\n".join(part), encoding="utf-16")
        else:
            import pyarrow
            from pyarrow import parquet

            table = pyarrow.table({"text": part})
            parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=30)
    if kind == "dataset":
        return DataConfig(dataset=str(folder), stream=True)
    return DataConfig(path=str(folder), separator="\n\n", stream=True)


KINDS = ["jsonl", "jsonl.gz", "txt", "crlf", "utf-16", "parquet", "dataset"]


def one_pass(config: DataConfig, seed: int = 0) -> list[list[bytes]]:
    """What every reader reads before any of it comes again."""
    source = open_source(config)
    found = []
    for index in range(config.readers):
        reader = Reader(source, config, index=index, seed=seed)
        found.append([reader.next_document()])
        while reader.cursor.epoch == 0:
            found[-1].append(reader.next_document())
        found[-1].pop()  # the first of the next pass
    return found


@pytest.mark.parametrize("readers", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_readers_share_the_training_text_and_read_all_of_it_once(tmp_path, kind, readers):
    documents = texts()
    config = changed(write(tmp_path / "text", kind, documents), readers=readers, lanes=10)
    found = one_pass(config)
    wanted = Counter(d.encode() for d in documents if split_of(d.encode(), config.held_out) == "train")
    assert Counter(chain.from_iterable(found)) == wanted
    assert all(found) and max(wanted.values()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_goes_on_exactly_from_any_cursor(tmp_path, kind):
    config = write(tmp_path / "text", kind, texts())
    straight = Reader(open_source(config), config, index=0, seed=0)
    seen = []
    for _ in range(700):  # more than two passes
        cursor = straight.cursor
        seen.append((cursor, straight.next_document()))
    for at in range(0, 650, 61):
        again = Reader(open_source(config), config, index=0, seed=0)
        again.seek(Cursor(*seen[at][0]))
        for cursor, document in seen[at : at + 40]:
            assert again.next_document() == document, cursor


def test_each_pass_has_another_order_and_the_same_text(tmp_path):
    config = write(tmp_path / "text", "jsonl", texts())
    reader = Reader(open_source(config), config, index=0, seed=0)
    passes: list[list[bytes]] = [[], [], []]
    while True:
        document = reader.next_document()
        if reader.cursor.epoch == 3:
            break
        passes[reader.cursor.epoch].append(document)
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1] != passes[2]
    assert one_pass(config, seed=1)[0] != passes[0] == one_pass(config, seed=0)[0]


@pytest.mark.parametrize("ending", ["\n", " ", ""])
def test_a_file_without_separators_comes_in_pieces_that_join_to_it(tmp_path, ending):
    text = ending.join(texts(200)) + ("終" * 3000 if not ending else "")
    (tmp_path / "a.txt").write_text(text)
    found = []
    for readers in (1, 4):
        config = DataConfig(path=str(tmp_path / "a.txt"), stream=True, readers=readers)
        rows = [row for shard in open_source(config).shards for _, row in shard.rows(shard.begin)]
        assert b"".join(rows) == text.encode()
        assert all(row.decode() for row in rows)  # no character is split
        assert max(map(len, rows)) <= 1500 + 200 + 4
        found.append(rows)
    assert found[0] == found[1]  # whoever reads them


@pytest.mark.parametrize("longest", [1000, 1499, 1500, 1501, 3300, 20_000])
def test_a_long_document_comes_in_pieces_and_its_neighbours_whole(tmp_path, longest):
    random = np.random.default_rng(longest)
    documents = [
        "a" * 20,
        *("x" * int(n) for n in random.integers(1, longest, 20)),
        "\n".join("z" * longest),
        "end",
    ]
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    for readers in (1, 3, 7):
        config = DataConfig(
            path=str(tmp_path / "a.txt"), separator="\n\n", stream=True, readers=readers, lanes=21
        )
        rows = [row for shard in open_source(config).shards for _, row in shard.rows(shard.begin)]
        assert b"".join(rows) == "".join(documents).encode()
        whole = [d.encode() for d in documents if len(d) <= 1500]
        assert not Counter(whole) - Counter(rows)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_line_ends_in_a_row_make_the_documents_that_splitting_makes(tmp_path, monkeypatch, most):
    monkeypatch.setattr(shards, "LEAST_SHARD", 7)
    monkeypatch.setattr(shards, "DOCUMENT_BYTES", 10_000)
    random = np.random.default_rng(most)
    text = "".join("ab"[n % 2] + "\n" * int(random.integers(0, most + 1)) for n in range(400))
    (tmp_path / "a.txt").write_text(text)
    for separator in ("\n\n", "a\na", "\n\n\n"):
        for readers in (1, 5, 40):
            lanes = 40
            config = DataConfig(
                path=str(tmp_path), separator=separator, stream=True, readers=readers, lanes=lanes
            )
            rows = [row for shard in open_source(config).shards for _, row in shard.rows(shard.begin)]
            assert rows == [part.encode() for part in text.split(separator) if part]


def test_held_out_text_is_that_of_the_beginning_and_never_read_in_training(tmp_path):
    documents = texts(400)
    documents += documents[:50]  # copies fall on the same side
    config = changed(write(tmp_path / "text", "jsonl", documents), held_out=0.1)
    corpora = load_corpora(config)
    held_out = {d.tobytes() for split in ("validation", "test") for d in corpora[split]}
    trained = set(chain.from_iterable(one_pass(config)))
    assert 40 < len(held_out) < 120 and not held_out & trained
    assert {d.tobytes() for d in corpora["train"]} == trained
    assert held_out | trained == {d.encode() for d in documents}


def test_only_the_beginning_is_looked_at(tmp_path, monkeypatch):
    config = changed(write(tmp_path / "text", "jsonl", texts(400)), held_out=0.1)
    monkeypatch.setattr(stream, "HEAD_BYTES", 20_000)
    corpora = load_corpora(config)
    assert 20_000 <= sum(len(corpus.text) for corpus in corpora.values()) < 22_000
    assert load_corpora(config)["train"].fingerprint == corpora["train"].fingerprint


def test_a_source_is_known_by_its_content_and_not_by_its_place(tmp_path):
    first = open_source(write(tmp_path / "a", "jsonl", texts()))
    assert open_source(write(tmp_path / "b", "jsonl", texts())).fingerprint == first.fingerprint
    assert open_source(write(tmp_path / "c", "jsonl", texts(seed=1))).fingerprint != first.fingerprint


# ---- what goes wrong


def drain(config: DataConfig, count: int = 1000) -> None:
    reader = Reader(open_source(config), config, index=0, seed=0)
    for _ in range(count):
        reader.next_document()


def test_a_part_that_vanishes_is_named(tmp_path):
    config = write(tmp_path / "text", "jsonl", texts())
    source = open_source(config)
    (tmp_path / "text" / "part-2.jsonl").unlink()
    reader = Reader(source, config, index=0, seed=0)
    with pytest.raises(FileNotFoundError, match=r"part-2\.jsonl"):
        for _ in range(400):
            reader.next_document()


def test_a_packed_file_that_ends_early_is_named(tmp_path):
    config = write(tmp_path / "text", "jsonl.gz", texts())
    path = tmp_path / "text" / "part-2.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"part-2\.jsonl\.gz: damaged gzip file"):
        drain(config)


def test_a_damaged_parquet_file_is_named(tmp_path):
    config = write(tmp_path / "text", "parquet", texts())
    path = tmp_path / "text" / "part-2.parquet"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"part-2\.parquet: not a readable parquet file"):
        drain(config)


def test_one_bad_row_is_left_out_and_said_and_many_end_the_stream(tmp_path):
    config = write(tmp_path / "text", "jsonl", texts())
    path = tmp_path / "text" / "part-1.jsonl"
    path.write_text(path.read_text() + '{"body": "x"}\n')
    with pytest.warns(
        UserWarning, match=r"left out a bad row: .*part-1\.jsonl, byte [0-9,]+: no field 'text'"
    ):
        assert len(one_pass(config)[0]) > 200
    path.write_text(path.read_text() + '{"body": "x"}\n' * 3)
    with pytest.raises(ValueError, match=r"no field 'text'.*bad rows: 2 of the first"):
        drain(config)


def test_text_that_is_not_utf_8_is_named_by_its_place(tmp_path):
    config = write(tmp_path / "text", "txt", texts())
    path = tmp_path / "text" / "part-0.txt"
    path.write_bytes(path.read_bytes() + b"\n\ncaf\xe9 au lait\n\ncaf\xe9\n\n")
    with pytest.raises(ValueError, match=r"part-0\.txt, byte [0-9,]+: not UTF-8: byte 0xe9"):
        drain(config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"held_out": 0.0001}, "leave nothing for validation at data.held_out=0.0001"),
        ({"readers": 16, "path": "one.jsonl", "held_out": 0.3}, "too few for data.readers=16: lower it"),
        ({"path": "blank.jsonl"}, "holds no text"),
    ],
)
def test_a_stream_that_cannot_be_shared_or_holds_nothing_is_refused(tmp_path, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path / "text", "jsonl", texts())
    Path("one.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(20)))
    Path("blank.jsonl").write_text('{"text": " "}\n' * 9)
    with pytest.raises(ConfigError, match=says):
        load_corpora(changed(config, **changes))
        Reader(open_source(changed(config, **changes)), changed(config, **changes), index=15, seed=0)


def test_a_reader_that_finds_nothing_in_a_whole_pass_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 500)
    config = DataConfig(path=str(tmp_path), stream=True)
    with pytest.raises(ValueError, match="reader 1 of 1 found no training text in all of its"):
        drain(config)


def test_a_stream_needs_a_source_and_lanes_for_its_readers():
    with pytest.raises(ConfigError, match="stream reads data.path or data.dataset"):
        DataConfig(stream=True)
    with pytest.raises(ConfigError, match="divisible by data.readers, got 16 and 3 readers"):
        DataConfig(stream=True, path="x", readers=3)
