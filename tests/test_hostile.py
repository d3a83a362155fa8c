"""Nothing is let in: whatever stands in a file, a prompt or a path, the end is a result or one line, code 2."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from fuzz import fuzz

from hldm import cli
from hldm.config import Config, ConfigError, load_config, section_from_dict
from hldm.generation.writer import Continuation
from hldm.runs.reports import check_report_path

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(saved_pipeline, tmp_path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(saved_pipeline, tmp_path / "pipeline"))


def test_a_thousand_random_inputs_are_read_or_refused():
    figures = fuzz(1000, seed=0)
    assert figures["faults"] == []
    assert figures["read"] > 250 and figures["refused"] > 250  # neither all good nor all bad


# --- settings


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"seed: !!python/object/apply:os.system ['true']", ":1:7: anchors, aliases and tags"),
        (b"a: &a [x, x]\nb: [*a, *a]", ":1:4: anchors"),
        (b"data: " + b"[" * 5000, ":1:8: expected a single value"),
        (b"{a: " * 5000, "nested deeper"),
        (b"seed: 1\nseed: 2", ":2:1: duplicate key"),
        (b"sede: 1", ":1:7: unknown key 'sede'"),
        (b"seed: [1]", ":1:7: seed must be"),
        (b"seed: \xff", ":1:7: byte 0xff"),
        (b"seed: \0", ":1:7: the character"),
        (b'base: "\\0"', ":1:7: base"),
        (b'base: "\\ud800"', ":1:7: base"),
        (b"".join(b"k%d: 1\n" % i for i in range(10_000)), ":1:5: unknown key 'k0'"),
        (b"logging: {trackers: [" + b"a," * 49_000 + b"a]}", ":1:21: logging.trackers must have at most 64"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_a_hostile_config_is_one_line_with_its_place(data, where, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert where in str(error.value) and "a.yaml" in str(error.value) and "\n" not in str(error.value)
    assert time.process_time() - began < 8


def test_a_huge_config_is_not_read(tmp_path):
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(ConfigError, match=r"a\.yaml: longer than"):
        load_config(tmp_path / "a.yaml")


def test_a_long_chain_of_bases_and_long_lists_of_a_dict_are_refused(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml")
    with pytest.raises(ConfigError, match="chain of more than 50 bases"):
        load_config(tmp_path / "0.yaml")
    with pytest.raises(ConfigError, match="at most 64 items"):
        section_from_dict(Config, {"logging": {"trackers": ["a"] * 5001}})


# --- texts

# what a file is made of -> what is said; all are read by one process with 1 GB of address space
LARGE = {
    "a.jsonl, one line of 100 MB": ("file.write(b'a' * 10**8)", "a row of more than"),
    "b.jsonl, 1 GB of zeros": ("file.truncate(10**9)", "it is binary, not text"),
    "c.jsonl.gz, a bomb": ("file.write(BOMB)", "a row of more than"),
    "d.txt.gz, a bomb": ("file.write(BOMB)", "unpacks to more than 100 times"),
    "e.parquet.gz, a bomb": ("file.write(BOMB)", "unpacks to more than 100 times"),
    "f.jsonl, depth 10^5": ("file.write(b'[' * 10**5)", "not a row of JSON"),
    "g.jsonl, lists in 15 MB": ("file.write(b'[' + b'[],' * (5 * 2**20) + b'[]]')", "expected an object"),
    "h.jsonl, 10^6 empty lines": ("file.write(b'\\n' * 10**6)", "holds no text"),
    "i.jsonl, 100,000 empty texts": ('file.write(b\'{"text": ""}\\n\' * 100_000)', "holds no text"),
}
READ = """
import resource, sys, time, zlib
import pyarrow.parquet
from hldm.config import DataConfig
from hldm.sources.corpora import load_corpora
# 10 GB of one letter in 10 MB: one block of 100 MB, a hundred times
packer = zlib.compressobj(9, zlib.DEFLATED, 31)
BOMB = packer.compress(b'a' * 10**8) + packer.flush(zlib.Z_FULL_FLUSH)
BOMB += 99 * (packer.compress(b'a' * 10**8) + packer.flush(zlib.Z_FULL_FLUSH))
for path, make in zip(sys.argv[1::2], sys.argv[2::2]):
    with open(path, "wb") as file:
        exec(make)
resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
for path in sys.argv[1::2]:
    began = time.process_time()
    try:
        load_corpora(DataConfig(path=path))
    except ValueError as error:
        print(error)
    assert time.process_time() - began < 10, path
"""


def test_hostile_texts_are_refused_within_a_gigabyte(tmp_path):
    words = [
        word for name, (make, _) in LARGE.items() for word in (str(tmp_path / name.partition(",")[0]), make)
    ]
    done = subprocess.run([sys.executable, "-c", READ, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, line in zip(LARGE, done.stdout.splitlines(), strict=True):
        assert name.partition(",")[0] in line and LARGE[name][1] in line


def test_one_bad_row_in_a_thousand_is_left_out_and_counted(tmp_path):
    rows = [json.dumps({"text": f"text {i} "}) for i in range(3000)]
    rows[1500], rows[2500] = '{"text": 3}', "{"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    from hldm.config import DataConfig
    from hldm.sources.corpora import load_corpora

    with pytest.warns(UserWarning, match=r"left out 2 bad of 3,000 rows; the first: .*a\.jsonl:1501: field"):
        corpora = load_corpora(DataConfig(path=str(path)))
    assert sum(map(len, corpora.values())) == 2998
    rows[1501], rows[2999] = "{", "{"
    path.write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"a\.jsonl:1501: .*\(bad rows: 4 of the first 3,000\)"):
        load_corpora(DataConfig(path=str(path)))


# --- prompts and terminals

NASTY = (
    "\x1b[2J \x1b]52;c;eA==\x07 \x1bP1$r\x1b\\ \x9b31m \x7f \u202e \u2066 \r x\ty é".encode() + b"\xff\x9b"
)
PROMPTS = {
    "empty": b"",
    "one byte": b"\x80",
    "NUL": b"a\0b",
    "half a pair": b"\xed\xa0\x80",
    "BOM and CRLF": b"\xef\xbb\xbfa\r\nb\r",
    "right to left": "שלום \u202eabc".encode(),
    "joined": "👩\u200d👩\u200d👧".encode(),
    "10^4 marks": ("a" + "\u0301" * 10_000).encode(),
    "every byte": bytes(range(256)),
    "nasty": NASTY,
}


@pytest.fixture
def generate(folder):
    def run(*arguments: str) -> int:
        return cli.generate(["--run", str(folder), "--max-chars", "3", *arguments])

    return run


@pytest.mark.parametrize("name", PROMPTS)
def test_any_bytes_are_a_prompt_and_a_pipe_gets_them_back(name, generate, tmp_path, capfdbinary, monkeypatch):
    """As an argument; a file must hold text, whose byte-order mark and line ends are those of training text."""
    prompt = PROMPTS[name]
    if b"\0" not in prompt:  # no argument can hold it
        assert generate("--prompt", os.fsdecode(prompt)) == 0
        out, error = capfdbinary.readouterr()
        assert out.startswith(prompt) and error == b""
    path = tmp_path / "prompt"
    path.write_bytes(prompt + b"\n")
    is_text = b"\0" not in prompt and prompt.decode("utf-8", "ignore").encode() == prompt
    code = generate("--prompt-file", str(path))
    out, error = capfdbinary.readouterr()
    if is_text:
        read = prompt.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").removesuffix(b"\r")
        assert code == 0 and out.startswith(read) and error == b""
    else:
        assert code == 2 and out == b"" and error.count(b"\n") == 1
    with path.open("rb") as file, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", os.fdopen(os.dup(file.fileno()), "r"))
        assert generate("--prompt-file", "-") == code
        sys.stdin.close()
    again, error = capfdbinary.readouterr()
    assert again == out and error.count(b"\n") == (not is_text)


def test_a_prompt_that_never_ends_is_refused(generate, refused):
    assert "/dev/zero: holds NUL bytes" in refused(generate("--prompt-file", "/dev/zero"))
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        code = generate("--prompt-file", f"/dev/fd/{endless.stdout.fileno()}")
        endless.kill()
    assert "longer than 1,048,576 bytes" in refused(code)


def written_to_terminal(work) -> bytes:
    """What a terminal receives as standard output while `work` runs."""
    mine, theirs = pty.openpty()
    kept = sys.stdout
    with os.fdopen(theirs, "w", encoding="utf-8", closefd=False) as terminal:
        sys.stdout = terminal
        try:
            assert work() == 0
        finally:
            sys.stdout = kept
    os.set_blocking(mine, False)
    data = os.read(mine, 2**16)
    os.close(theirs)
    os.close(mine)
    return data.replace(b"\r\n", b"\n")  # the terminal's own


@pytest.mark.parametrize("more", [(), ("--show-chunks",), ("--num-samples", "2"), ("--json",)])
def test_what_the_model_writes_reaches_no_terminal_raw(more, generate, monkeypatch):
    def write_on(autoencoder, prior, prompts, settings, **options):
        rows = [Continuation(prompt) for prompt in prompts]
        for byte in NASTY:  # a byte at a time: no sequence is whole in any piece
            for row in rows:
                row.chunks.append(bytes([byte]))
            yield rows, [bytes([byte])] * len(rows), 0

    monkeypatch.setattr("hldm.generation.writer.write_on", write_on)
    shown = written_to_terminal(lambda: generate("--prompt", os.fsdecode(NASTY), *more)).decode()
    shown = re.sub("\x1b\\[(0|30;48;5;(153|223))m", "", shown)  # the tints of chunks are ours
    unsafe = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\u202e", "\u2066"} - {"\n", "\t"}
    assert not unsafe & set(shown) and "\\x1b" in shown or "\\u001b" in shown
    if not more:
        raw = written_to_terminal(lambda: generate("--prompt", os.fsdecode(NASTY), "--raw"))
        assert raw == NASTY + NASTY + b"\n"


@pytest.mark.parametrize("name", ["NO_COLOR", "TERM"])
def test_chunks_are_marked_where_no_colours_are_wanted(name, generate, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    (tmp_path / "a.txt").write_text("some words here")

    def shown() -> bytes:
        return written_to_terminal(lambda: generate("--prompt", "a", "--show-chunks")) + written_to_terminal(
            lambda: cli.main(["chunk", "--text", str(tmp_path / "a.txt"), "--strategy", "words"])
        )

    assert shown().count(b"\x1b[30;48") >= 3
    monkeypatch.setenv(name, "dumb")
    assert b"\x1b" not in shown() and b"some| words| here" in shown()


def test_an_error_message_steers_no_terminal(refused):
    assert "\\x1b[2J" in refused(cli.generate(["--run", "no\x1b[2J", "--prompt", "a"]))


# --- where output goes


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/dev/full"), "not a regular file"),
        (lambda path: path.write_text("my notes"), "is no report of this kind"),
        (lambda path: path.write_text('{"mine": 1}'), "is no report of this kind"),
        (lambda path: path.write_text("[" * 10**5), "is no report of this kind"),
        (lambda path: path.write_text("3"), "is no report of this kind"),
    ],
)
def test_a_report_replaces_nothing_but_a_report(make, says, tmp_path):
    path = tmp_path / "report.json"
    make(path)
    with pytest.raises(ValueError, match=says):
        check_report_path(path, "bits_per_character")


def test_a_report_goes_where_it_can(tmp_path):
    path = tmp_path / "report.json"
    check_report_path(path, "a")
    path.write_text('{"a": 1}')
    check_report_path(path, "a")
    for wrong in (path / "below", tmp_path / "no" / "folder", Path("/dev/full")):
        with pytest.raises((ValueError, OSError)):
            check_report_path(wrong, "a")


def test_a_full_disk_as_standard_output_is_one_line(folder):
    arguments = ["train-autoencoder", "--config", str(ROOT / "configs/tiny.yaml"), "--print-config"]
    code = f"import sys; from hldm import cli; sys.exit(cli.main({arguments}))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "hldm: [Errno 28] No space left on device\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "shell",
    [
        "{command} | head -c 1 > /dev/null",
        "{command} | true",
        "{command} > /dev/full",
        "{command} >&-",
        "{command} 2>&-",
        "{stdin} <&-",
        "{stdin} < /dev/null",
        "LANG=C LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii {command}",
        "env -u HOME HF_HUB_OFFLINE=1 {command}",
        "head -c 10000000 /dev/urandom | {stdin}",
    ],
)
def test_a_process_ends_in_order_whatever_it_is_connected_to(shell, folder):
    start = f"{sys.executable} {ROOT / 'generate.py'} --run {folder} --max-chars 30"
    shell = shell.format(command=f"{start} --prompt é", stdin=f"{start} --prompt-file -")
    done = subprocess.run(["bash", "-c", shell], capture_output=True, timeout=120)
    assert done.returncode in (0, 2) and b"Traceback" not in done.stderr and done.stderr.count(b"\n") <= 1
