"""What takes long says so on standard error, what is quick says nothing, and both end when the work does."""

from __future__ import annotations

import re
import threading
import time
from contextlib import nullcontext

import pytest

from hldm.runs import doing as said
from hldm.runs.doing import doing, loading, reached


def test_what_takes_long_is_said_again_and_again_and_what_is_quick_is_not(capsys):
    with doing("waiting", first=0.01, every=0.02):
        time.sleep(0.5)
    out, error = capsys.readouterr()
    lines = error.splitlines()
    assert not out and len(lines) >= 2 and set(lines) == {"hldm: waiting, 0:00 so far"}
    with doing("a moment"):
        pass
    assert capsys.readouterr().err == ""


def test_work_that_says_how_far_it_is_has_an_end(capsys):
    reached(1, 2)  # nothing is being done: nobody asks
    with doing("the whole", first=0.02, every=60):
        reached(1, 1000)
        with doing("a part of it", first=0.05, every=60):
            reached(0, 10)  # not known yet
            time.sleep(0.3)
        time.sleep(0.1)
    whole, part = sorted(capsys.readouterr().err.splitlines(), reverse=True)
    assert part == "hldm: a part of it, 0:00 so far"
    assert re.fullmatch(r"hldm: the whole, 0:00 so far, about 0:[1-9][0-9]? left", whole)


def test_imports_are_said_on_a_terminal_alone(monkeypatch, capsys):
    monkeypatch.setattr(said, "PATIENCE", 0.0)
    with loading():
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
    began: list[str] = []
    monkeypatch.setattr(said, "doing", lambda what: began.append(what) or nullcontext())
    monkeypatch.setattr(said.sys.stderr, "isatty", lambda: True, raising=False)
    with loading():
        pass
    assert began == ["loading torch and diffusers"]


def test_an_error_ends_it(capsys):
    before = threading.active_count()
    with pytest.raises(ValueError, match="no"), doing("failing"):
        raise ValueError("no")
    assert threading.active_count() == before
