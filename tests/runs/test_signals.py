"""What a signal does to the contexts that hear it, to a process that does not leave, and to one below a launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from hldm.runs.signals import Interrupt, Stopped


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
