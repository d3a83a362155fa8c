"""The library is built whole or not at all, by any number of processes, and its absence is no fault."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from hldm.kernels import library as kernels
from hldm.model.ops import linear_scan

ASK = "from hldm.kernels import library as kernels; print(kernels.kernels())"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path, plain_torch):
    """A cache folder of one's own, and nothing remembered before or after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.kernels.cache_clear()
    yield
    kernels.kernels.cache_clear()


@pytest.mark.slow
def test_two_processes_build_one_library_and_a_third_finds_it(tmp_path):
    asking = [subprocess.Popen([sys.executable, "-c", ASK], stdout=subprocess.PIPE) for _ in range(2)]
    told = [process.communicate()[0].decode() for process in asking]
    (library,) = (tmp_path / "hldm").iterdir()  # and no scratch is left
    assert all(str(library) in answer for answer in told)
    before = library.stat().st_mtime_ns
    assert kernels.library() is not None
    assert library.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("HLDM_KERNELS", "0", "off"),
        ("CXX", "false", "none, torch"),
        ("CXX", "no-such-compiler", "none, torch"),
        ("CXX", "g++ 'unclosed", "none, torch"),
        ("CXX", "env LANG=C false", "none, torch"),
        ("XDG_CACHE_HOME", "/dev/null/none", "none, torch"),
        ("XDG_CACHE_HOME", "/proc/none", "none, torch"),
    ],
)
def test_without_kernels_all_goes_on_in_torch(monkeypatch, tmp_path, variable, value, told):
    monkeypatch.setenv(variable, value)
    assert kernels.library() is None and kernels.kernels().told.startswith(told)
    h, _ = linear_scan(torch.full((1, 9, 2), 0.5), torch.ones(1, 9, 2))
    torch.testing.assert_close(h[0, :, 0], 2 - 0.5 ** torch.arange(9))
    assert not list(tmp_path.rglob("*.so"))


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path):
    (tmp_path / "hldm").mkdir()
    (tmp_path / "hldm").chmod(0o777)
    assert kernels.library() is None and "no other's to write to" in kernels.kernels().told


def script(path, text: str) -> str:
    path.write_bytes(b"#!/bin/sh\n" + text.encode("latin-1"))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("printf 'caf\xe9\\n' >&2; exit 1", "caf"),
        ("printf '\x1b[31mred\x1b[0m' >&2; exit 1", r"\x1b[31mred"),
        ("printf '\xff\xfe'; exit 0", "none, torch"),  # succeeds, and makes nothing
        ("kill -9 $$", "SIGKILL"),
        ("for last; do :; done; [ $last = --version ] || echo no library > $last", "none, torch"),
    ],
)
def test_whatever_a_compiler_says_or_makes_torch_goes_on(monkeypatch, tmp_path, text, says):
    monkeypatch.setenv("CXX", script(tmp_path / "my compiler", text))
    assert kernels.library() is None
    told = kernels.kernels().told
    assert told.startswith("none, torch") and says in told and told.isprintable()


def test_a_user_without_a_home_has_no_kernels_and_no_fault(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert kernels.library() is None and "home" in kernels.kernels().told.lower()


@pytest.fixture
def tiny_sources(monkeypatch, tmp_path):
    """Sources that compile at once."""
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "one.cpp").write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(kernels, "SOURCES", tmp_path / "cpp")
    (tmp_path / "built").mkdir()
    return tmp_path / "built"


def test_a_compiler_may_be_several_words_or_stand_in_a_folder_with_spaces(
    monkeypatch, tmp_path, tiny_sources
):
    for cxx in ("env LANG=C c++", script(tmp_path / "my c++", 'exec c++ "$@"'), "  "):
        monkeypatch.setenv("CXX", cxx)
        assert ctypes.CDLL(str(kernels.build(tiny_sources))).one() == 1


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "flipped", "longer", "a folder"])
def test_a_damaged_library_is_built_anew_before_it_is_loaded(tiny_sources, damage):
    """Loading one may end the process, with SIGBUS or worse: it must not come to that."""
    library = kernels.build(tiny_sources)
    good = library.read_bytes()
    half = len(good) // 2
    library.unlink()
    if damage == "a folder":
        library.mkdir()
        with pytest.raises(OSError):
            kernels.build(tiny_sources)
        return
    library.write_bytes(
        {
            "cut": good[:half],
            "zeros": bytes(len(good)),
            "empty": b"",
            "flipped": good[:half] + bytes([good[half] ^ 1]) + good[half + 1 :],
            "longer": good + b"x",
        }[damage]
    )
    again = kernels.build(tiny_sources)
    assert ctypes.CDLL(str(again)).one() == 1 and list(tiny_sources.iterdir()) == [again]
    before = again.stat().st_mtime_ns
    assert kernels.build(tiny_sources) == again and again.stat().st_mtime_ns == before


def test_half_a_library_from_the_compiler_is_never_loaded(monkeypatch, tmp_path, tiny_sources):
    """As a full disk leaves it: loading it would end this process with SIGBUS."""
    half = 'exec 2>&1; for last; do :; done; c++ "$@" && truncate -s 5000 "$last"'
    monkeypatch.setenv("CXX", script(tmp_path / "c++", f'case "$1" in --version) echo 1;; *) {half};; esac'))
    with pytest.raises(subprocess.CalledProcessError):
        kernels.build(tiny_sources)
    assert not list(tiny_sources.glob("*.so"))
