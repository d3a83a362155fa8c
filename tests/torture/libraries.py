"""Damaged caches of compiled kernels, and compilers that fail: built anew, or torch alone and a line that says why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

import hldm.kernels.forms  # noqa: F401 - here, not in every child
from hldm.kernels import library
from hldm.model import ops
from tests.torture import children
from tests.torture.trial import Skipped, Trial

DAMAGES = 60
# Stands for a compiler: fast, and as wrong as asked. $out is where the library is wanted.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && { %s; exit 0; }
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
%s
"""
SPEAKS = "echo compiler 1.0"
COMPILERS: dict[str, tuple[str, str]] = {  # what it says of its version, what it makes
    "fails": (SPEAKS, "exit 1"),
    "fails in Latin-1": (SPEAKS, r"printf 'erreur: fichier non trouv\351\n' >&2; exit 1"),
    "fails in colours": (SPEAKS, r"printf '\033[31merror\033[0m\n\r\007' >&2; exit 1"),
    "fails at length": (SPEAKS, "yes error | head -c 3000000 >&2; exit 1"),
    "a version in Latin-1": (r"printf 'version fran\347aise\n'", 'cp GOOD "$out"'),
    "is killed": (SPEAKS, "kill -9 $$"),
    "makes nothing": (SPEAKS, "exit 0"),
    "makes an empty file": (SPEAKS, ': > "$out"'),
    "makes half a library": (SPEAKS, 'head -c 40000 GOOD > "$out"'),
    "makes another's library": (SPEAKS, 'cp OTHER "$out"'),
    "makes a text": (SPEAKS, 'echo "no library" > "$out"'),
    "makes a folder": (SPEAKS, 'mkdir "$out"'),
    "has no version": ("exit 3", 'cp GOOD "$out"'),
    "works": (SPEAKS, 'cp GOOD "$out"'),
}
WORDS = ('"', "g++ '", "nowhere/g++", "/dev/null", "/", "ccache", "g++ --no-such-option", "false", "true")
HOMES: dict[str, Callable[[Path], dict[str, str]]] = {  # where the cache is to be, made if need be
    "a file": lambda folder: {"XDG_CACHE_HOME": str(touched(folder / "file"))},
    "nowhere": lambda folder: {"XDG_CACHE_HOME": "/proc/none"},
    "a relative one": lambda folder: {"XDG_CACHE_HOME": "cache"},
    "another's": lambda folder: {"XDG_CACHE_HOME": str(made(folder, "hldm", owner=12345))},
    "open to others": lambda folder: {"XDG_CACHE_HOME": str(made(folder, "hldm", mode=0o777))},
    "a loop of links": lambda folder: {"XDG_CACHE_HOME": str(linked(folder / "loop"))},
    "no home": lambda folder: {"XDG_CACHE_HOME": "", "HOME": "/nonexistent"},
}


def touched(path: Path) -> Path:
    """An empty file."""
    path.touch()
    return path


def made(folder: Path, name: str, mode: int = 0o700, owner: int = -1) -> Path:
    """A folder with another in it, of this owner and mode; returns the outer one."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    os.chown(folder / name, owner, -1)
    (folder / name).chmod(mode)
    return folder


def linked(path: Path) -> Path:
    """A link to itself."""
    path.symlink_to(path.name)
    return path


def torture(trial: Trial) -> None:
    found = library.kernels()
    if found.library is None:
        raise Skipped(f"C++ kernels: {found.told}")
    good = Path(found.told)
    other = next(Path(torch.__file__).parent.glob("lib/libshm*"), Path(torch.__file__))
    works = compiler(trial.folder / "works.sh", "works", good, other)
    ends: dict[str, int] = {}
    for number in range(trial.count(DAMAGES)):
        cache = trial.folder / f"{number}"
        work(cache, {"CXX": str(works)})
        [kept] = (cache / "hldm").glob("kernels-*.so")
        damage = damaged(trial, kept)
        # a folder where the library should be is left to its owner
        expected = {"kernels", "torch"} if "folder" in damage else {"kernels"}
        check(trial, f"a library {damage}", cache, {"CXX": str(works)}, expected, ends)
        shutil.rmtree(cache)
    for name in trial.sample(sorted(COMPILERS)):
        script = compiler(trial.folder / f"{name} c++", name, good, other)
        expected = {"kernels"} if name in ("works", "a version in Latin-1") else {"torch"}
        check(
            trial,
            f"a compiler that {name}",
            trial.folder / "compilers" / name,
            {"CXX": str(script)},
            expected,
            ends,
        )
    for words in trial.sample(WORDS):
        check(trial, f"CXX={words!r}", trial.folder / "words", {"CXX": words}, {"kernels", "torch"}, ends)
    for name in trial.sample(sorted(HOMES)) if os.getuid() == 0 else []:
        place = trial.folder / f"home {name}"
        place.mkdir()
        check(
            trial,
            f"a cache in {name}",
            place,
            {"CXX": str(works), **HOMES[name](place)},
            {"kernels", "torch"},
            ends,
        )
    trial.note = ", ".join(f"{count} with {end}" for end, count in sorted(ends.items()))


def compiler(path: Path, name: str, good: Path, other: Path) -> Path:
    """A script that stands for a compiler."""
    version, makes = COMPILERS[name]
    path.write_text(COMPILER % (version, makes.replace("GOOD", f"'{good}'").replace("OTHER", f"'{other}'")))
    path.chmod(0o700)
    return path


def damaged(trial: Trial, path: Path) -> str:
    """Damage a cached library; returns how."""
    data = path.read_bytes()
    at = trial.draw.randrange(len(data))
    kind = trial.draw.choice(
        ["cut", "flipped", "zeroed", "longer", "emptied", "deleted", "a folder", "a loop"]
    )
    path.unlink()
    match kind:
        case "cut":
            path.write_bytes(data[:at])
        case "flipped":
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << trial.draw.randrange(8)]) + data[at + 1 :])
        case "zeroed":
            path.write_bytes(data[:at] + bytes(len(data) - at))
        case "longer":
            path.write_bytes(data + b"\0")
        case "emptied":
            path.touch()
        case "a folder":
            path.mkdir()
        case "a loop":
            path.symlink_to(path.name)
    return f"{kind} at {at}"


def work(cache: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Ask for the kernels in a child and scan with what there is; its status and what it says, one object of JSON."""
    cache.mkdir(parents=True, exist_ok=True)
    log = cache / "log"
    log.unlink(missing_ok=True)

    def scan() -> int:
        os.chdir(cache)
        library.kernels.cache_clear()
        found = library.kernels()
        inputs = torch.rand(2, 9, 16), torch.rand(2, 9, 16), torch.rand(2, 16)
        plain = ops.scan.__wrapped__(*inputs)  # type: ignore[attr-defined]
        far = (ops.scan(*inputs)[0] - plain[0]).abs().max().item()
        print(json.dumps({"has": found.library is not None, "told": found.told, "far": far}))
        return 0

    status = children.wait(children.fork(scan, log, {"XDG_CACHE_HOME": str(cache), **environment}), 120)
    return status, log.read_text(errors="replace")


def check(
    trial: Trial,
    injection: str,
    cache: Path,
    environment: dict[str, str],
    expected: set[str],
    ends: dict[str, int],
) -> None:
    """Record one start. expected: what may compute then, kernels or torch;  ends: counts of what did."""
    status, said = work(cache, environment)
    wrong = []
    try:
        found = json.loads(said)
        end = "kernels" if found["has"] else "torch"
        ends[end] = ends.get(end, 0) + 1
        if end not in expected:
            wrong.append(f"{end} computes: {found['told']}")
        if not found["has"] and (len(found["told"]) > 300 or not found["told"].isprintable()):
            wrong.append(f"told badly: {found['told']}")
        if not found["far"] < 1e-5:
            wrong.append(f"the scan is {found['far']} off")
    except ValueError:
        wrong.append(f"no word of it: {said[-500:]}")
    trial.record(injection, wrong + ([f"ended with {status}"] if status else []))
