"""A signal is honoured in every phase: what can be saved is saved, one line says so, the exit code is 128 + n."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from hldm import cli
from hldm.config import to_yaml
from hldm.generation.writer import LatentWriter
from hldm.model.autoencoder import Autoencoder
from hldm.runs.checkpoints import newest_checkpoint
from hldm.runs.signals import Interrupt, Stopped
from hldm.text.windows import Windows
from hldm.training import stage, stages
from hldm.training import trainer as training
from hldm.training.trainer import Trainer


def run_program(program: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a Python program to its end; returns it and the seconds it took."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    return done, time.monotonic() - began


# --- the contexts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.requested is None
        os.kill(os.getpid(), number)
        assert interrupt.requested == number
    assert signal.getsignal(number) is before


def test_where_nothing_is_to_save_a_signal_raises() -> None:
    with pytest.raises(Stopped, match="stopped by SIGUSR1"), Interrupt(raises=True):
        os.kill(os.getpid(), signal.SIGUSR1)
        pytest.fail("went on")


def test_the_innermost_context_decides_and_nothing_is_forgotten() -> None:
    seen = []
    with pytest.raises(Stopped), Interrupt(raises=True):
        with Interrupt() as outer:
            with pytest.raises(Stopped), Interrupt(raises=True):
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(outer.requested)
            with pytest.raises(Stopped), Interrupt(raises=True):
                seen.append(None)  # asked already: not even entered
        seen.append(None)  # the inner context did not act on it: so does the outer
    assert seen == [signal.SIGTERM]
    with Interrupt() as later:
        assert later.requested is None


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = """
import os, signal, time
from hldm.runs.signals import Interrupt
with Interrupt() as interrupt:
    os.kill(os.getpid(), signal.SIGINT)
    print(interrupt.requested, flush=True)
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    print("never")
"""
    done, seconds = run_program(program)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, f"{signal.SIGINT:d}\n", "")
    assert seconds < 5


def test_a_second_signal_is_heard_though_the_main_thread_is_not_in_python() -> None:
    program = """
import hashlib, os, signal, threading, time
from hldm.runs.signals import Interrupt
def press_twice():
    for _ in range(2):
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGTERM)
with Interrupt():
    threading.Thread(target=press_twice, daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, without a look at signals
"""
    done, seconds = run_program(program)
    assert (done.returncode, done.stdout + done.stderr) == (128 + signal.SIGTERM, "") and seconds < 8


def test_one_key_press_that_arrives_twice_is_one_wish() -> None:
    with Interrupt() as interrupt:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        assert interrupt.requested == signal.SIGINT


def test_what_does_not_leave_is_ended() -> None:
    program = """
import hashlib, os, signal, sys, threading
from hldm.runs.signals import leave_in_one_line
def work():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
sys.exit(leave_in_one_line(work))
"""
    done, seconds = run_program(program)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "hldm: stopped by SIGINT\n")
    assert seconds < 10


def test_no_exception_reaches_an_import(tmp_path: Path) -> None:
    """There it may meet C++ that is being initialised, and abort it."""
    (tmp_path / "half_made.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept BaseException:\n    os.abort()\n"
    )
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom hldm.runs.signals import leave_in_one_line\ndef work():\n"
        "    print('so far')\n    import half_made\nsys.exit(leave_in_one_line(work))"
    )
    done, _ = run_program(program, str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (143, "so far\n", "hldm: stopped by SIGTERM\n")


def test_what_is_half_made_is_not_destroyed() -> None:
    """A command that a signal ended runs what Python has registered, and no destructors of libraries."""
    program = (
        "import atexit, os, signal, sys\nfrom hldm import cli\n"
        "class Library:\n    def __del__(self, abort=os.abort):\n        abort()\n"
        "library = Library()\nlibrary.itself = library\natexit.register(print, 'registered')\n"
        "cli.guarded = lambda work: 143\nsys.argv = ['hldm', 'doctor']\nsys.exit(cli.main())"
    )
    done, _ = run_program(program)
    assert (done.returncode, done.stdout) == (143, "registered\n")


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with Interrupt() as interrupt:
            seen.append((signal.getsignal(signal.SIGTERM), interrupt.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)] and signal.getsignal(signal.SIGTERM) is before


# --- the launcher

WAIT = """
import sys, time
from hldm.runs.signals import leave_in_one_line
def work():
    print("started", flush=True)
    time.sleep(30)
    return 0
sys.exit(leave_in_one_line(work))
"""


def start_below(launcher: Path, environment: dict[str, str]) -> tuple[subprocess.Popen[str], int]:
    """Start WAIT as the child of a process that runs `launcher`; returns that process and the child's number."""
    launcher.write_text(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {WAIT!r}])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(launcher)],
        env={**os.environ, **environment},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert parent.stdout is not None
    lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    (number,) = lines - {"started"}
    return parent, int(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_ends_with_its_launcher(number: signal.Signals, tmp_path: Path) -> None:
    parent, child = start_below(tmp_path / "accelerate.py", {"ACCELERATE_DYNAMO_MODE": "default"})
    with parent:
        time.sleep(0.2)
        parent.send_signal(number)
        assert parent.stdout is not None
        began = time.monotonic()
        assert parent.stdout.read() == "hldm: stopped by SIGTERM\n"  # to the end: the child is gone
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("shell.py", {"ACCELERATE_DYNAMO_MODE": "default"}),
        ("accelerate.py", {"ACCELERATE_LOG_LEVEL": "info"}),
    ],
)
def test_a_process_that_no_launcher_started_lives_on(
    name: str, environment: dict[str, str], tmp_path: Path
) -> None:
    parent, child = start_below(tmp_path / name, environment)
    with parent:
        parent.kill()
        parent.wait()
        time.sleep(1.5)
        os.kill(child, 0)  # alive
        os.kill(child, signal.SIGTERM)


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
            Windows,
            "batch",
            5,
            ["training.autoencoder.accumulation=2", "logging.validate_every=0"],
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
            signal_at(3, patch, LatentWriter, "write")
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


def test_a_signal_finds_a_reader_that_does_not_read(trained_run):
    # a pipe holds 64 KiB: the prompt alone fills it, and writing blocks
    text = "In the beginning God made the heaven and the earth. " * 2000
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), "--run", str(trained_run), "--prompt-file", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(text.encode())
    process.stdin.close()
    process.stdout.read(1)
    time.sleep(0.5)
    process.terminate()
    began = time.monotonic()
    assert process.wait(timeout=20) == 143 and time.monotonic() - began < 10
    assert process.stderr.read() == b"hldm: stopped by SIGTERM\n"
    process.stdout.close()
    process.stderr.close()


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
