"""Nothing is let in: whatever stands in a file, a prompt or a path, the end is a result or one line, code 2."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from fuzz import fuzz, tiny_pipeline
from safetensors.torch import save

from hldm import cli
from hldm.config import ConfigError, config_from_dict, load_config
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.generation.writer import Continuation
from hldm.model.autoencoder import Autoencoder
from hldm.runs.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from hldm.runs.reports import check_report_path
from hldm.text.windows import load_latents

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A pipeline with random weights. Read only."""
    folder = tmp_path_factory.mktemp("hostile") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


@pytest.fixture
def refused(capsys):
    """Check that a command ends with code 2 and one line on standard error, and return the line."""

    def check(code: int) -> str:
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("hldm: ") and error.count("\n") == 1, (code, error)
        return error

    return check


def test_two_thousand_random_inputs_are_read_or_refused():
    figures = fuzz(2000, seed=0)
    assert figures["faults"] == []
    assert figures["read"] > 500 and figures["refused"] > 500  # neither all good nor all bad


# --- saved models

CANARY = "canary"
PICKLE = b"cos\nsystem\n(S'touch %s'\ntR."  # os.system("touch canary")


def evil(folder: Path) -> bytes:
    """A pickle that leaves a file behind when it is loaded."""
    return PICKLE % str(folder / CANARY).encode()


@pytest.mark.parametrize("keep_weights", [True, False])
@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "model.pkl"]
)
def test_a_pickle_beside_or_instead_of_weights_is_never_run(name, keep_weights, folder, tmp_path):
    for part in ("autoencoder", "prior"):
        (folder / part / name).write_bytes(evil(tmp_path))
        if not keep_weights:
            (folder / part / WEIGHTS).unlink()
    if keep_weights:
        read_pipeline(folder)
    else:
        with pytest.raises(ValueError, match=f"{WEIGHTS} is missing"):
            read_pipeline(folder)
        with pytest.raises(FileNotFoundError, match="is missing"):
            Autoencoder.from_pretrained(folder / "autoencoder")
    assert not (tmp_path / CANARY).exists()


def test_a_pickle_under_any_name_that_is_read_is_refused_and_never_run(saved, tmp_path):
    for number, file in enumerate(path.relative_to(saved) for path in saved.rglob("*") if path.is_file()):
        folder = Path(shutil.copytree(saved, tmp_path / str(number)))
        (folder / file).write_bytes(evil(tmp_path))
        if file.parts[0] == "tokenizer":  # holds nothing that is needed, and is not read
            read_pipeline(folder)
            continue
        with pytest.raises(ValueError, match="cannot be loaded"):
            read_pipeline(folder)
    weight = {"w": torch.ones(2)}
    checkpoint = save_checkpoint(tmp_path, 1, {"model": weight, "optimizer": weight}, {}, keep=1)
    for path in checkpoint.iterdir():
        good = path.read_bytes()
        path.write_bytes(evil(tmp_path))
        with pytest.raises(CheckpointError):
            load_checkpoint(checkpoint)
        path.write_bytes(good)
    for name in ("latents.safetensors", "config.yaml"):
        (tmp_path / name).write_bytes(evil(tmp_path))
    with pytest.raises(ValueError, match="not a file of cached latents"):
        load_latents(tmp_path / "latents.safetensors", {})
    with pytest.raises(ConfigError):
        load_config(tmp_path / "config.yaml")
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", ["evil", "Pipeline"]),
        ("_class_name", "StableDiffusionPipeline"),
        ("prior", ["evil", "Prior"]),
        ("prior", ["subprocess", "Popen"]),
        ("scheduler", ["evil", "DDIMScheduler"]),
        ("scheduler", ["diffusers", "UniPCMultistepScheduler"]),
        ("scheduler", [[], {}]),
        ("tokenizer", ["transformers", "BertTokenizer"]),
        ("another", ["evil", "Model"]),
        ("defaults", {"steps": 10**12}),
        ("defaults", {"steps": "many"}),
        ("defaults", 3),
    ],
)
def test_an_index_cannot_name_other_classes_or_settings(key, value, folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, key: value}))
    for place in (folder, folder / "prior"):
        (place / "evil.py").write_text(f"open({str(tmp_path / CANARY)!r}, 'w')")
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        HLDMPipeline.from_pretrained(folder)
    assert "\n" not in str(error.value) and not (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: config["chunking"].update(max_bytes="4"), None),  # a number in quotes is a number
        (lambda config: config["chunking"].update(max_bytes="six"), "chunking|max_bytes"),
        (lambda config: config["autoencoder"].update(latent_dim=3), "must be F32"),
        (lambda config: config["autoencoder"]["encoder"].update(mlp_ratio=1e30), "mlp_ratio"),
        (lambda config: config["autoencoder"]["encoder"].update(blocks=["recurrent"] * 10_000), "5000"),
        (lambda config: config.update(quantization_config={}), "unknown key 'quantization_config'"),
        (lambda config: config.update(gamma_0=True), "gamma_0 must be of type float"),
        (lambda config: config.update(_class_name="Prior"), "expected the config of a Autoencoder"),
        (lambda config: config.pop("chunking"), "chunking is missing"),
    ],
)
def test_a_model_is_what_its_config_says(change, says, folder):
    path = folder / "autoencoder" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    if says is None:
        Autoencoder.from_pretrained(folder / "autoencoder")
        return
    with pytest.raises(ValueError, match=says) as error:
        Autoencoder.from_pretrained(folder / "autoencoder")
    assert "\n" not in str(error.value)


def headers(good: bytes) -> dict[str, bytes]:
    """Safetensors files that are not what they seem."""
    size = int.from_bytes(good[:8], "little")
    head, body = json.loads(good[8 : 8 + size]), good[8 + size :]
    name = next(key for key in head if key != "__metadata__")
    entry = head[name]
    first, last = entry["data_offsets"]

    def file(text: bytes | dict) -> bytes:
        text = json.dumps(text).encode() if isinstance(text, dict) else text
        return len(text).to_bytes(8, "little") + text + body

    twice = json.dumps(head).encode()[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
    return {
        "empty": b"",
        "a few bytes": b"1234567",
        "zeros": bytes(len(good)),
        "length 2^64": b"\xff" * 8 + good[8:],
        "length 99 MB": (99 * 10**6).to_bytes(8, "little") + good[8:],
        "a real header of 20 MB": file(b"{" + b" " * 20_000_000 + b"}"),
        "no tensor": file({}),
        "overlap": file({**head, name: {**entry, "data_offsets": [first + 4, last + 4]}}),
        "hole": file({**head, name: {**entry, "data_offsets": [first, last - 4]}}),
        "shape 2^80": file({**head, name: {**entry, "shape": [2**40, 2**40]}}),
        "negative": file({**head, name: {**entry, "shape": [-1, 4]}}),
        "nested": file(b"[" * 200_000),
        "one name twice": file(twice),
        "one key twice": good.replace(b'"dtype"', b'"shape"', 1),
        "cut": good[: len(good) // 2],
        "longer": good + bytes(100),
    }


@pytest.fixture(scope="module")
def attacks(saved) -> dict[str, bytes]:
    return headers((saved / "autoencoder" / WEIGHTS).read_bytes())


@pytest.mark.parametrize("name", [*headers(save({"w": torch.ones(2)}))])
def test_weights_with_a_hostile_header_are_refused_at_once_and_cheaply(name, attacks, folder):
    (folder / "autoencoder" / WEIGHTS).write_bytes(attacks[name])
    memory, began = peak_bytes(), time.process_time()
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        read_pipeline(folder)
    assert "\n" not in str(error.value)
    assert time.process_time() - began < 1 and peak_bytes() - memory < 300e6


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("part", ["autoencoder", "prior"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state, name: state.pop(name), "missing tensor"),
        (lambda state, name: state.update(another=torch.ones(1)), "unknown tensor 'another'"),
        (lambda state, name: state.update({name: state[name].double()}), "must be F32"),
        (lambda state, name: state.update({name: state[name][None]}), "must be F32"),
        (lambda state, name: state.update({name: state[name] * float("nan")}), "is not finite"),
        (lambda state, name: state.update({name: state[name] + float("inf")}), "is not finite"),
    ],
)
def test_weights_must_be_exactly_those_of_the_model(part, change, says, folder):
    model = getattr(read_pipeline(folder), part)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state, next(name for name in state if state[name].is_floating_point()))
    (folder / part / WEIGHTS).write_bytes(save(state))
    with pytest.raises(ValueError, match=says) as error:
        read_pipeline(folder)
    assert "\n" not in str(error.value)


# --- settings


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"seed: !!python/object/apply:os.system ['true']", ":1:7: tags"),
        (b"a: &a [x, x]\nb: [*a, *a]", ":1:4: anchors"),
        (b"data: " + b"[" * 5000, ":1:8: expected"),
        (b"{a: " * 5000, "nested deeper"),
        (b"seed: 1\nseed: 2", ":2:1: duplicate key"),
        (b"sede: 1", ":1:7: unknown key 'sede'"),
        (b"seed: [1]", ":1:7: seed must be"),
        (b"seed: \xff", ":1:7: byte 0xff"),
        (b"seed: \0", ":1:7: the character"),
        (b'base: "\\0"', ":1:7: base"),
        (b'base: "\\ud800"', ":1:7: base"),
        (b"".join(b"k%d: 1\n" % i for i in range(60_000)), "more than 5000 keys and values"),
        (b"logging: {trackers: [" + b"a," * 400_000 + b"a]}", "more than 5000 keys and values"),
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
    with pytest.raises(ConfigError, match="more than 5000 values"):
        config_from_dict({"logging": {"trackers": ["a"] * 5001}})


# --- texts

# what a file is made of -> what is said, or "" where it is read; each in a process with 1 GB of address space
LARGE = {
    "a.jsonl, one line of 100 MB": ("file.write(b'a' * 10**8)", "a row of more than"),
    "a.jsonl, 1 GB of zeros": ("file.truncate(10**9)", "it is binary, not text"),
    "a.jsonl.gz, a bomb": ("bomb(file)", "a row of more than"),
    "a.txt.gz, a bomb": ("bomb(file)", "unpacks to more than 100 times"),
    "a.parquet.gz, a bomb": ("bomb(file)", "unpacks to more than 100 times"),
    "a.jsonl, depth 10^5": ("file.write(b'[' * 10**5)", "not a row of JSON"),
    "a.jsonl, lists in 15 MB": ("file.write(b'[' + b'[],' * (5 * 2**20) + b'[]]')", "expected an object"),
    "a.jsonl, 10^6 empty lines": ("file.write(b'\\n' * 10**6)", "holds no text"),
    "a.jsonl, 10^6 empty texts": ('file.write(b\'{"text": ""}\\n\' * 10**6)', "holds no text"),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_hostile_text_is_refused_within_a_gigabyte(name, tmp_path):
    make, says = LARGE[name]
    path = tmp_path / name.partition(",")[0]
    code = f"""
import gzip, resource, sys, time, zlib
def bomb(file):  # 10 GB of one letter in 10 MB: one block of 100 MB, a hundred times
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    file.write(packer.compress(b'a' * 10**8) + packer.flush(zlib.Z_FULL_FLUSH))
    block = packer.compress(b'a' * 10**8) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(99):
        file.write(block)
with open({str(path)!r}, "wb") as file:
    {make}
from hldm.config import DataConfig
from hldm.text.corpus import load_corpora
if "parquet" in {name!r}:
    import pyarrow.parquet
resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
began = time.process_time()
try:
    load_corpora(DataConfig(path={str(path)!r}))
except ValueError as error:
    print(error)
assert time.process_time() - began < 10
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout and done.stdout.count("\n") == 1


def test_one_bad_row_in_a_thousand_is_left_out_and_counted(tmp_path):
    rows = [json.dumps({"text": f"text {i} "}) for i in range(3000)]
    rows[1500], rows[2500] = '{"text": 3}', "{"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    from hldm.config import DataConfig
    from hldm.text.corpus import load_corpora

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
