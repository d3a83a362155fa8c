"""What a training shows: two lines that fit a terminal, plain lines elsewhere, times that can be."""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import ROOT

from hldm.runs import progress
from hldm.runs.progress import BARS, Curve, Part, Picture, Progress, clock, describe

SPEED = {"characters_per_second": 23_456.7, "seconds": 1.0}
ONE = {"decoder": 1.5, "latent": 0.604, **SPEED}
TWO = {"latent": 0.991, "end": 0.003, **SPEED}
VALIDATION = {"bound": 2.213, "latent": 1.0, "decoder": 1.21, "end": 0.003}


def picture(**changes) -> Picture:
    curve = Curve()
    for step in range(100):
        curve.add(2 + 6 / (1 + step))
    shown = {
        "run": "mine",
        "stage": "stage 1 of 2, autoencoder",
        "progress": 0.436,
        "left": 72.0,
        "in_all": 260.0,
        "step": 1200,
        "bits": "2.104 bits/char",
        "validation": 2.213,
        "speed": 23_456.7,
        "curve": curve,
    }
    return Picture(**shown | changes)


def test_two_lines_of_80_columns_hold_all_that_matters():
    first, second = picture().lines(80)
    assert len(first) == 80 and len(second) <= 80
    assert first.startswith("mine stage 1 of 2, autoencoder ━")
    assert first.endswith("╌  43% 1:12 left, 4:20 in all")
    assert second.startswith("step 1,200  2.104 bits/char  validation 2.213  23,457 chars/s  █")
    assert second.endswith(BARS[0])  # the curve falls


@pytest.mark.parametrize("columns", [1, 5, 20, 33, 40, 60, 80, 100, 250])
@pytest.mark.parametrize("run", ["m", "a-name-of-so-many-letters-as-a-run-may-have-64-is-what-they-are-xy"])
@pytest.mark.parametrize("validation", [None, 2.213])
def test_no_line_is_wider_than_the_terminal(columns, run, validation):
    for plain in (False, True):
        lines = picture(run=run, validation=validation).lines(columns, plain)
        assert max(map(len, lines)) <= columns
        assert not plain or all(line.isascii() for line in lines)
        if columns >= 40:
            assert "1:12 left" in lines[0] and "43%" in lines[0] and "step 1,200" in lines[1]


def test_what_is_not_known_is_not_shown_and_the_end_is_the_end():
    first, _ = picture(left=None, in_all=None).lines(80)
    assert "left" not in first and first.endswith("43%")
    first, _ = picture(progress=1.0, left=0.0, in_all=0.0).lines(80)
    assert first.endswith("━ 100% 0:00 left") and "╌" not in first
    assert "99%" in picture(progress=0.9999).lines(80)[0]


def test_a_curve_keeps_its_shape_however_long_it_gets():
    curve = Curve()
    assert curve.drawn(20) == ""
    curve.add(float("nan"))
    assert curve.drawn(20) == ""
    for step in range(10_000):
        curve.add(10_000 - step)
    drawn = curve.drawn(40)
    assert len(curve.points) <= progress.MOST_POINTS and len(drawn) == 40
    assert list(drawn) == sorted(drawn, reverse=True) and set(drawn) == set(BARS)
    flat = Curve()
    for _ in range(3):
        flat.add(2.0)
    assert flat.drawn(40) == BARS[0] * 3


def test_seconds_become_minutes_and_hours():
    assert [clock(seconds) for seconds in (0.4, 65, 3599.9, 3700, 360_000)] == [
        *("0:00", "1:05", "59:59", "1:01:40", "100:00:00")
    ]


def test_stage_two_tells_the_total_where_it_is_known():
    assert describe(ONE, VALIDATION).startswith(
        "2.104 bits/char (decoder 1.500 + latent 0.604) validation 2.213 23,457"
    )
    assert describe(TWO, VALIDATION).startswith(
        "validation 2.213 bits/char (latent 1.000 + decoder 1.210 + end 0.003) latents in training 0.994 23,457"
    )
    assert "validation (step 114) " in describe(ONE, VALIDATION, 114)  # one that was made before
    assert describe(TWO).startswith("0.994 bits/char in latents alone")


@pytest.mark.parametrize("jump", [0.0, 1e-9, 0.3, 0.999, 1.02, 50.0])
def test_the_time_left_is_never_negative_nor_more_than_all_is_done(jump, monkeypatch):
    """A share of the clock jumps when a machine sleeps, and the last step takes it beyond 1."""
    seconds = itertools.count(step=10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    said: list[str] = []
    with Progress(Path("runs/mine/autoencoder"), Part(1, 2, None), said.append, live=False) as shown:
        for step, share in enumerate((0.0, jump, jump + 0.01, jump + 1.0), start=1):
            shown.advance(step, share, ONE, every=1)
    assert said.pop(0).startswith("legend: bits/char: ")  # once
    assert len(said) == 4 and all(line.startswith("mine/autoencoder: step ") for line in said)
    for line in said:
        assert int(re.search(r"(\d+)%", line)[1]) <= 100 and "-" not in line
    assert said[-1].endswith("100% 2.104 bits/char (decoder 1.500 + latent 0.604) 23,457 chars/s 0:00 left")


# ---- a terminal


TRAINING = """
import time
from pathlib import Path
from hldm.runs.progress import Part, Progress, say_line
metrics = {"decoder": 1.5, "latent": 0.604, "characters_per_second": 23456.7, "seconds": 1.0}
with Progress(Path("runs/mine/autoencoder"), Part(1, 2, 0.5), say_line, live=True) as shown:
    for step in range(1, 101):
        if step == 50:
            shown.validated({"bound": 2.213, "latent": 1.0, "decoder": 1.21, "end": 0.003}, 2)
            say_line("step 50: something to be said")
        shown.advance(step, step / 100, {**metrics, "decoder": 1.5 + 1 / step}, every=50)
        time.sleep(0.003)
"""


def on_terminal(columns: int = 80, **environment: str) -> str:
    """What the training above writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**clean, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment},
    )
    os.close(theirs)
    found = b""
    try:
        while data := os.read(ours, 65_536):
            found += data
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0, found
    return found.decode()


def screen(written: str, columns: int = 80) -> list[str]:
    """What stands on a terminal in the end, by the few controls that rich uses. Nothing may be wider than it."""
    rows, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", written):
        if part == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif match := re.fullmatch(r"\x1b\[([0-9]*)A", part):
            row -= int(match[1] or 1)
        elif part == "\x1b[2K":
            rows[row] = ""
        elif part and part[0] not in "\x1b\r":
            rows[row] += part
            assert len(rows[row]) <= columns, rows[row]
    return [line for line in rows if line]


def test_a_terminal_shows_two_lines_that_change_and_what_is_said_above():
    written = on_terminal()
    shown = screen(written)
    *said, first, second = shown
    assert "step 50: something to be said" in said and said[0].startswith("legend: bits/char: ")
    assert re.fullmatch(r"mine stage 1 of 2, autoencoder ━+ 100% 0:00 left, 0:30 in all", first)
    assert second.startswith("step 100  2.114 bits/char  validation 2.213  23,457 chars/s  █")
    assert second.endswith("▁") and written.count("\x1b[2K") > 4  # it was drawn several times
    assert "\x1b[36m" in written or "\x1b[1;36m" in written


@pytest.mark.parametrize(
    "environment", [{"NO_COLOR": "1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_without_colours_or_letters_gets_none(environment):
    written = on_terminal(60, **environment)
    shown = screen(written, 60)
    assert shown[-2].endswith("100% 0:00 left, 0:30 in all") and shown[0].startswith("legend: ")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", written) if "NO_COLOR" in environment else written.isascii()


def test_every_name_on_a_line_is_explained_once_when_it_appears():
    said: list[str] = []
    with Progress(Path("runs/mine/autoencoder"), Part(1, 2, None), said.append, live=False) as shown:
        shown.advance(1, 0.1, ONE, every=1)
        shown.validated(VALIDATION, 2)
        shown.advance(2, 0.2, {**ONE, "rank": 2.0, "prototypes": 9.0}, every=1)
        shown.advance(3, 0.3, {**ONE, "rank": 2.0, "prototypes": 9.0}, every=1)
    first, second = (line for line in said if line.startswith("legend: "))
    assert [told.split(":")[0] for told in first.removeprefix("legend: ").split("; ")] == [
        *("bits/char", "decoder", "latent")
    ]
    assert [told.split(":")[0] for told in second.removeprefix("legend: ").split("; ")] == [
        *("validation", "prototypes", "rank")
    ]
    assert said.index(second) == 2 and "prototypes 9 rank 2.0" in said[3]


def test_the_names_of_stage_two_are_explained_as_those_of_stage_one():
    said: list[str] = []
    alone = {"latent": 0.7, "end": 0.001, "characters_per_second": 9.0}
    with Progress(Path("runs/mine/prior"), Part(2, 2, None), said.append, live=False) as shown:
        shown.advance(1, 0.1, alone, every=1)
        shown.validated(VALIDATION, 0)  # that of stage one's end
        shown.advance(2, 0.2, alone, every=1)
        shown.advance(3, 0.3, alone, every=1)
    first, second = (line for line in said if line.startswith("legend: "))
    names = [
        [told.split(":")[0] for told in line.removeprefix("legend: ").split("; ")] for line in (first, second)
    ]
    assert names == [
        ["bits/char in latents alone", "latent", "end"],
        ["validation", "decoder", "latents in training"],
    ]
    for name in ("validation ", "latent ", "decoder ", "end ", "latents in training "):
        assert name in said[-1]
    assert "before it has learnt" not in "".join(said)  # it begins with stage one's mixture


def test_the_first_step_is_said_to_be_untrained_and_a_validation_is_a_line():
    said: list[str] = []
    with Progress(Path("runs/mine/autoencoder"), Part(1, 2, None), said.append, live=False) as shown:
        shown.validated(VALIDATION, 0)
        shown.advance(1, 0.1, ONE, every=1)
        shown.advance(2, 0.2, ONE, every=50)
        shown.validated(VALIDATION, 3)
        shown.advance(3, 0.3, ONE, every=50)
        shown.advance(4, 0.4, ONE, every=50)
    lines = [line for line in said if "/autoencoder: step " in line]
    assert len(lines) == 2 and "(before it has learnt anything)" in lines[0] and "validation" not in lines[0]
    assert f"validation {VALIDATION['bound']:.3f}" in lines[1] and "before" not in lines[1]


def test_a_dumb_terminal_gets_plain_lines():
    written = on_terminal(TERM="dumb")
    assert "\x1b" not in written and written.count("mine/autoencoder: step ") == 2
