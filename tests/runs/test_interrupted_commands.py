"""A signal ends a command in every phase: what can be saved is saved, one line says so, the exit code is 128 + n."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from hldm import cli
from hldm.config import to_yaml
from hldm.generation.writer import Continuation
from hldm.model.autoencoder import Autoencoder
from hldm.runs.checkpoints import newest_checkpoint
from hldm.training import stage, stages
from hldm.training import trainer as training
from hldm.training.trainer import Trainer

# --- the phases of training


@pytest.fixture
def train(small_config, tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Run stage one, or the command given, in a folder of its own; returns exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(to_yaml(small_config))

    def run(*arguments: str, command: Callable[..., int] = cli.train_autoencoder) -> tuple[int, str]:
        began = time.monotonic()
        code = command(["--config", "small.yaml", *arguments])
        assert time.monotonic() - began < 10
        return code, capsys.readouterr().err

    return run


def signal_at(
    call: int, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int = signal.SIGTERM
) -> None:
    """Have this process signalled at the n-th call of owner.name."""
    original = getattr(owner, name)
    calls = []

    def signalled(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, signalled)


def endlessly(*_: Any, **__: Any) -> str:
    """A sample that would take for ever."""
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_at_the_first_step_saves_it(number, train, monkeypatch):
    signal_at(1, monkeypatch, Trainer, "step", number)
    code, error = train()
    assert code == 128 + number
    saved = "runs/small/autoencoder/checkpoints/step-000000001"
    assert error == f"hldm: stopped by {signal.Signals(number).name}; saved {saved}: go on with --resume\n"
    assert newest_checkpoint(Path("runs/small/autoencoder")).step == 1


@pytest.mark.parametrize(
    ("phase", "owner", "name", "call", "arguments", "step"),
    [
        (
            "accumulation",
            training,
            "nullcontext",
            3,
            ["training.accumulation=2"],
            3,
        ),
        ("periodic save", training, "save_checkpoint", 2, [], 6),
        ("last save", training, "save_checkpoint", 4, [], 12),
        ("export", stage, "export", 1, [], 12),
    ],
)
def test_a_signal_in_a_phase_of_training_loses_no_step(
    phase, owner, name, call, arguments, step, train, monkeypatch
):
    with monkeypatch.context() as patch:
        signal_at(call, patch, owner, name)
        code, error = train(*arguments)
    path = f"runs/small/autoencoder/checkpoints/step-{step:09d}"
    assert (code, error) == (143, f"hldm: stopped by SIGTERM; saved {path}: go on with --resume\n")
    assert newest_checkpoint(Path("runs/small/autoencoder")).step == step
    assert train("--resume", *arguments) == (0, "")


@pytest.mark.parametrize(("every", "step"), [(4, 4), (0, 12)])
def test_a_signal_ends_a_sample_and_saves(every, step, train, monkeypatch):
    monkeypatch.setattr(stages, "_sample", endlessly)
    code, error = train(f"logging.sample_every={every}")
    assert code == 143 and error.count("\n") == 1 and f"step-{step:09d}" in error
    assert newest_checkpoint(Path("runs/small/autoencoder")).step == step


@pytest.mark.parametrize(
    ("owner", "name"), [(stages, "load_corpora"), (stages, "make_chunker"), (stage, "open_run")]
)
def test_a_signal_before_training_leaves_in_one_line(owner, name, train, monkeypatch):
    signal_at(1, monkeypatch, owner, name)
    assert train() == (143, "hldm: stopped by SIGTERM\n")
    assert not list(Path().rglob("checkpoints"))


# --- what only reads


def test_a_signal_while_writing_leaves_what_is_written(trained_run, monkeypatch, capsysbinary):
    whole, parts = [], []
    for arguments in (["--prompt", "And the"], ["--prompt", "And the", "--num-samples", "2"]):
        for seed in range(100):  # the first that goes on for more than three chunks
            command = ["--run", str(trained_run), "--max-chars", "60", "--seed", str(seed), *arguments]
            assert cli.generate([*command, "--show-chunks"]) == 0
            if capsysbinary.readouterr().out.count(b"|") > 3 * (1 + len(parts)):
                break
        assert cli.generate(command) == 0
        whole.append(capsysbinary.readouterr().out)
        with monkeypatch.context() as patch:
            signal_at(3, patch, Continuation, "add")
            assert cli.generate(command) == 143
        out, error = capsysbinary.readouterr()
        assert error == b"hldm: stopped by SIGTERM\n"
        parts.append(out)
    assert parts[0].endswith(b"\n") and len(b"And the\n") < len(parts[0]) < len(whole[0])
    assert whole[0].startswith(parts[0].rstrip(b"\n").rstrip("\N{REPLACEMENT CHARACTER}".encode()))
    assert parts[1].startswith(b"[1] And the") and b"\n[2] And the" in parts[1]


def test_a_signal_ends_an_evaluation(trained_run, monkeypatch, capsys):
    signal_at(1, monkeypatch, Autoencoder, "encode", signal.SIGINT)
    assert cli.main(["evaluate", "--run", str(trained_run)]) == 130
    assert capsys.readouterr().err == "hldm: stopped by SIGINT\n"


def test_a_signal_finds_a_reader_that_does_not_read(trained_run, tmp_path, monkeypatch, capsys):
    # a pipe holds 64 KiB: the prompt alone fills it, and writing blocks
    (tmp_path / "prompt.txt").write_text("In the beginning God made the heaven and the earth. " * 2000)
    command = ["--run", str(trained_run), "--prompt-file", str(tmp_path / "prompt.txt")]
    ours, theirs = os.pipe()
    sent = []

    def signal_when_full() -> None:
        while select.select([], [theirs], [], 0)[1]:
            time.sleep(0.01)
        time.sleep(0.2)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    pipe = os.fdopen(theirs, "w")
    threading.Thread(target=signal_when_full, daemon=True).start()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", pipe)
        assert cli.generate(command) == 143 and time.monotonic() - sent[0] < 10
    assert capsys.readouterr().err == "hldm: stopped by SIGTERM\n"
    os.close(ours)
    with suppress(BrokenPipeError):
        pipe.close()


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal, as Linux tells."""
    mask = Path(f"/proc/{process}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_a_signal_during_start_up_leaves_in_one_line(number, seconds, small_overrides, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "train_autoencoder.py"),
        "--config",
        str(ROOT / "configs/tiny.yaml"),
    ]
    process = subprocess.Popen(
        [*command, *small_overrides, "training.autoencoder.steps=100000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not catches(process.pid, signal.SIGTERM):  # before that the interpreter itself dies of the signal
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(number)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert error.startswith(f"hldm: stopped by {number.name}") and error.count("\n") == 1
