"""Whatever goes wrong between a dataset's name and its text is one line that names the cause and the file."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hldm.config import ConfigError, DataConfig, changed
from hldm.sources.corpora import load_corpora, load_corpus
from hldm.sources.hub import HUB_TIMEOUT_S

DOCUMENTS = [f"document {i}: é and \ufeffmore" for i in range(300)]


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def jsonl(documents: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({field: document, "n": 1}).encode() + b"\n" for document in documents)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of one's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("stream", [True, False])
def test_a_local_dataset_folder_is_read_like_a_file(tmp_path, monkeypatch, stream):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = write(tmp_path / "set" / "train.jsonl", jsonl(DOCUMENTS, field="body"))
    config = DataConfig(dataset=str(file.parent), field="body", stream=stream)
    plain = DataConfig(path=str(file), field="body", stream=stream)
    expected = load_corpus(plain, "test").fingerprint
    assert load_corpus(config, "test").fingerprint == expected
    datasets.Dataset.from_dict({"body": DOCUMENTS}).save_to_disk(tmp_path / "saved")
    assert load_corpus(changed(config, dataset=str(tmp_path / "saved")), "test").fingerprint == expected
    for key, value, fault in [
        ("split", "nope", "cannot be read"),
        ("subset", "nope", "cannot be read"),
        ("field", "nope", "row 1: no field 'nope'"),
    ]:
        with pytest.raises(ValueError, match=fault) as error:
            load_corpus(changed(config, **{key: value}), "train")
        one_line(error)


def test_a_hub_that_does_not_answer_is_given_up_within_five_seconds(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert HUB_TIMEOUT_S < 5
    monkeypatch.setattr("hldm.sources.hub.HUB_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        start = time.perf_counter()
        with pytest.raises(ConfigError, match=r"cannot be reached.*data\.path.*built-in") as error:
            load_corpus(DataConfig(dataset="roneneldan/TinyStories", stream=True), "train")
        assert time.perf_counter() - start < 1.5
    one_line(error)


def test_offline_a_dataset_that_is_not_cached_is_refused(tmp_path):
    code = """
from hldm.config import DataConfig
from hldm.sources.corpora import load_corpus
try:
    load_corpus(DataConfig(dataset="roneneldan/TinyStories"), "train")
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    (line,) = done.stdout.splitlines()
    assert "data.dataset=roneneldan/TinyStories" in line and "data.path" in line


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("train.jsonl", jsonl(["x"]) + b'{"text": broken', r"JSON parse error.*train\.jsonl"),
        ("train.parquet", b"PAR1 and no more", r"[Pp]arquet.*train\.parquet"),
        ("train.jsonl.gz", b"\x1f\x8b not gzip", r"train\.jsonl\.gz|gzip|Compress"),
        ("train.csv", b"\xff\xfe\xff", r"train\.csv"),
    ],
)
def test_a_damaged_file_of_a_dataset_is_named_with_its_cause(
    cache, tmp_path, capfd, name, data, says, stream
):
    write(tmp_path / "set" / name, data)
    with pytest.raises(ValueError, match=r"data\.dataset=.*set") as error:
        load_corpora(DataConfig(dataset=str(tmp_path / "set"), stream=stream))
    line = one_line(error)
    assert re.search(says, line), line
    assert capfd.readouterr().err == ""  # nothing beside it


def test_a_dataset_that_is_a_program_is_refused_and_never_run(cache, tmp_path):
    script = write(tmp_path / "mine" / "mine.py", b"open('canary', 'w')")
    for name in (script.parent, script):
        with pytest.raises(ConfigError, match=r"mine\.py is a dataset script.*data\.path") as error:
            load_corpora(DataConfig(dataset=str(name)))
        one_line(error)
    assert not Path("canary").exists()


def test_a_saved_dictionary_of_datasets_is_read_by_its_split(cache, tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    datasets.DatasetDict(train=rows, other=rows.select([0])).save_to_disk(tmp_path / "saved")
    config = DataConfig(dataset=str(tmp_path / "saved"))
    assert sum(map(len, load_corpora(config).values())) == 300
    with pytest.raises(ConfigError, match="cannot be read.*nope"):
        load_corpora(changed(config, split="nope"))


ANSWERS = {
    "garbage": b"\x00\x01garbage",
    "nothing": b"",
    "no-status": b"HTTP/1.1 abc\r\n\r\n",
    "an-error": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
    "endless-head": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000,
    "half-a-chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no-JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: application/json\r\n\r\n<ht>\n",
}
ASK = """
import sys
from hldm.config import DataConfig
from hldm.sources.corpora import load_corpora
for name in sys.stdin:
    try:
        load_corpora(DataConfig(dataset=f"some/{name.strip()}", stream=True))
        print("read")
    except ValueError as error:
        print(error)
    sys.stdout.flush()
"""


def test_a_hub_that_answers_garbage_ends_in_one_line(tmp_path):
    asked: list[str] = []
    answered: set[str] = set()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(65536)
                    answered.add(asked[-1])
                    peer.sendall(ANSWERS[asked[-1]])

        threading.Thread(target=serve, daemon=True).start()
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "no_proxy": "127.0.0.1",
        }
        with subprocess.Popen(
            [sys.executable, "-c", ASK],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as asking:
            assert asking.stdin and asking.stdout and asking.stderr
            for name in ANSWERS:
                asked.append(name)
                asking.stdin.write(f"{name}\n")
                asking.stdin.flush()
                line = asking.stdout.readline()
                assert f"data.dataset=some/{name}" in line and "data.path" in line
            asking.stdin.close()
            rest, error = asking.stdout.read(), asking.stderr.read()
        server.shutdown(socket.SHUT_RDWR)
    assert (asking.returncode, rest) == (0, "") and answered == set(ANSWERS)
    assert "Traceback" not in error, error
