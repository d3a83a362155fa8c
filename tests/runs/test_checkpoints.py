"""Checkpoints come back bit for bit, or are found out; a kill or a full disk costs nothing acknowledged."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hldm.runs.checkpoints import (
    CheckpointError,
    checkpoints_in,
    flatten_optimizer,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    unflatten_optimizer,
)
from hldm.runs.files import atomic_write, fingerprint, sha256_of
from tests.torture.disk import Disk

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
FILES = ["MANIFEST.json", "state.json", "model.safetensors", "optimizer.safetensors"]


def some_tensors(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 6, generator=generator)
    return {"model": {"weight": weight, "step": torch.tensor(step)}, "optimizer": {"mean": weight[0] * 2}}


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, some_tensors(step), {"cursor": step}, keep)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_holds(path: Path, step: int) -> None:
    checkpoint = load_checkpoint(path)
    assert (checkpoint.step, checkpoint.state) == (step, {"cursor": step})
    for stem, tensors in some_tensors(step).items():
        assert checkpoint.tensors[stem].keys() == tensors.keys()
        assert all(torch.equal(checkpoint.tensors[stem][name], t) for name, t in tensors.items())


def hidden(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob(".*")]


# Round trip


def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path: Path) -> None:
    pattern = torch.arange(256, dtype=torch.uint8)  # every byte, and so NaNs, infinities and -0
    tensors = {str(d): pattern.clone().view(d) for d in DTYPES if d is not torch.bool}
    weight = torch.randn(6, 4)
    tensors |= {"bool": pattern % 3 == 0, "scalar": torch.tensor(3), "empty": torch.zeros(0, 5)}
    tensors |= {
        "strided": weight.T,
        "tied": weight,
        "tied too": weight,
        "row": weight[2],
        "step": weight[::2],
    }
    tensors |= {"parameter": torch.nn.Parameter(weight), "expanded": torch.ones(1, 3).expand(4, 3)}
    state = {"best": 1 / 3, "none": None, "seeds": [2**63, -1], "name": "é\u2028", "deep": {"a": [True]}}
    path = save_checkpoint(tmp_path, 7, {"model": tensors, "nothing": {}}, state, keep=1)
    back = load_checkpoint(path)
    assert (back.step, back.state, back.path) == (7, state, tmp_path / "checkpoints" / "step-000000007")
    assert back.tensors["nothing"] == {} and back.tensors["model"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = back.tensors["model"][name]
        assert (found.dtype, found.shape, bits(found)) == (tensor.dtype, tensor.shape, bits(tensor.detach()))
    assert fingerprint(back.tensors["model"]) == fingerprint(tensors)


def test_saving_a_step_twice_keeps_the_valid_one_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    before = (path / "MANIFEST.json").stat().st_ino
    assert save(tmp_path, 5) == path and (path / "MANIFEST.json").stat().st_ino == before
    (path / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="model.safetensors is damaged.*replacing"):
        save(tmp_path, 5)
    assert_holds(path, 5)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("state", [{"t": (1, 2)}, {"k": {1: 2}}, {"x": float("nan")}, {"x": torch.zeros(1)}])
def test_a_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the state of step 1"):
        save_checkpoint(tmp_path, 1, {}, state, keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stem", ["", "a/b", "..", "a.b", "x" * 65])
def test_a_file_stem_cannot_leave_the_folder(tmp_path: Path, stem: str) -> None:
    with pytest.raises(ValueError, match="file stem"):
        save_checkpoint(tmp_path, 1, {stem: {}}, {}, keep=1)


# Retention, and what is not ours


def test_the_newest_are_kept_and_later_steps_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 9, 3, 10):
        save(tmp_path, step, keep=2)
    assert list(checkpoints_in(tmp_path)) == [9, 10]
    assert list(checkpoints_in(tmp_path / "checkpoints")) == []
    save(tmp_path, 4, keep=1)  # fallen back to before 9: what is written now must not be what is deleted
    assert list(checkpoints_in(tmp_path)) == [4, 9, 10]


def test_what_is_not_ours_is_neither_read_nor_deleted(tmp_path: Path) -> None:
    home = tmp_path / "checkpoints"
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    foreign = ["step-abc", "step-9", "step-000000009.bak", "step-0000000009", "best", ".tmp-notes"]
    foreign += [f".tmp-step-9-{dead.pid}.bak", f".tmp-step-9-{living.pid}", f".del-step-x-{dead.pid}"]
    ours = [f".tmp-step-9-{dead.pid}", f".del-step-000000009-{dead.pid}", f".tmp-step-1-{os.getpid()}"]
    try:
        for name in foreign + ours:
            (home / name).mkdir(parents=True)
            (home / name / "notes.txt").write_text("mine")
        (home / f".tmp-step-8-{dead.pid}").symlink_to(home / "best")
        (home / "step-000000009").symlink_to(home / "best")
        for step in (1, 2, 3):
            save(tmp_path, step, keep=1)
        assert (checkpoint := newest_checkpoint(tmp_path)) and checkpoint.step == 3
        assert all((home / name / "notes.txt").exists() for name in foreign)
        assert (home / "step-000000009").is_symlink() and (home / f".tmp-step-8-{dead.pid}").is_symlink()
        assert not any((home / name).exists() for name in ours)
    finally:
        living.communicate(b"\n")


@pytest.mark.parametrize("call", ["rmtree", "rename"])
def test_a_failed_delete_is_only_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save(tmp_path, 1)

    def refuse(path: Path, *rest: Any, **options: Any) -> None:
        if call == "rmtree" and not options or call == "rename" and Path(path).name == "step-000000001":
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, *rest, **options)

    owner = shutil if call == "rmtree" else os
    real: Callable[..., None] = getattr(owner, call)
    monkeypatch.setattr(owner, call, refuse)
    with pytest.warns(UserWarning, match="step-000000001 could not be deleted: Permission denied"):
        assert_holds(save(tmp_path, 2, keep=1), 2)
    monkeypatch.undo()
    save(tmp_path, 3, keep=1)
    assert list(checkpoints_in(tmp_path)) == [3] and hidden(tmp_path) == []


# Damage


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    save(folder, 1)
    save(folder, 2)
    assert {path.name for path in checkpoints_in(folder)[2].iterdir()} == set(FILES)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def assert_found_out(folder: Path, name: str) -> None:
    newest = checkpoints_in(folder)[2]
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(newest)
    said: list[str] = []
    checkpoint = newest_checkpoint(folder, said.append)
    assert checkpoint is not None and checkpoint.step == 1
    assert len(said) == 1 and name in said[0] and "step-000000002" in said[0]


def damages(data: bytes) -> Iterator[bytes | None]:
    yield from (data[:n] for n in (0, 1, 8, len(data) // 2, len(data) - 1))
    yield from (data + b"\0", data + b"\n", data + b" ", bytes(len(data)), b"[" * 100_000, None)


@pytest.mark.parametrize("name", FILES)
def test_cut_longer_emptied_and_missing_files_are_found_out(folder: Path, name: str) -> None:
    file = folder / "checkpoints" / "step-000000002" / name
    for damage in damages(file.read_bytes()):
        file.write_bytes(damage) if damage is not None else file.unlink()
        assert_found_out(folder, name)


def test_flipped_bits_are_found_out(folder: Path) -> None:
    draw = random.Random(0)
    newest = checkpoints_in(folder)[2]
    for _ in range(100):
        file = newest / draw.choice(FILES)
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        assert_found_out(folder, "step-000000002")
        file.write_bytes(data)
    assert_holds(newest, 2)


def test_every_flipped_bit_of_the_manifest_is_found_out(folder: Path) -> None:
    file = folder / "checkpoints" / "step-000000002" / "MANIFEST.json"
    data = file.read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load_checkpoint(file.parent)


@pytest.mark.parametrize("place", ["manifest", "entry"])
def test_a_manifest_that_says_more_than_it_should_is_found_out(folder: Path, place: str) -> None:
    file = folder / "checkpoints" / "step-000000002" / "MANIFEST.json"
    manifest = json.loads(file.read_bytes())
    (manifest if place == "manifest" else manifest["files"]["state.json"])["sizes"] = 65
    file.write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(CheckpointError, match="MANIFEST.json is damaged"):
        load_checkpoint(file.parent)


def test_swapped_files_and_renamed_folders_are_found_out(folder: Path) -> None:
    one, two = checkpoints_in(folder).values()
    os.rename(one, one.with_name("step-000000003"))
    with pytest.raises(CheckpointError, match="was renamed: it holds step 1"):
        load_checkpoint(one.with_name("step-000000003"))
    os.rename(two / "model.safetensors", two / "x")
    os.rename(two / "optimizer.safetensors", two / "model.safetensors")
    os.rename(two / "x", two / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        load_checkpoint(two)


def test_with_every_checkpoint_damaged_a_run_does_not_start_from_zero(folder: Path) -> None:
    for path in checkpoints_in(folder).values():
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no valid checkpoint left.*step-000000002.*step-000000001"):
        newest_checkpoint(folder, lambda _: None)


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match="absent is not a finished checkpoint"):
        load_checkpoint(tmp_path / "absent")


def rewrite(path: Path, name: str, data: bytes) -> None:
    """Replace a file and have the manifest vouch for it: what an attacker can do and an accident cannot."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    manifest["files"][name] = {"bytes": len(data), "sha256": sha256_of(path / name)}
    (path / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json"])
@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema_is_refused(folder: Path, name: str, schema: Any) -> None:
    path = checkpoints_in(folder)[2]
    record = json.loads((path / name).read_bytes()) | {"schema": schema}
    data = (json.dumps(record, indent=1) + "\n").encode()
    rewrite(path, name, data) if name == "state.json" else (path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} has schema {schema}"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "listed", ["../secret", "/etc/passwd", "a/b.safetensors", "model.bin", "x.safetensors.pt"]
)
def test_a_manifest_cannot_point_elsewhere(folder: Path, listed: str) -> None:
    path = checkpoints_in(folder)[2]
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    manifest["files"][listed] = {"bytes": 0, "sha256": ""}
    (path / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(CheckpointError, match="MANIFEST.json is damaged: it lists"):
        load_checkpoint(path)


class Evil:
    """Runs code when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dump", ["pickle", "torch"])
def test_an_evil_pickle_is_never_run(folder: Path, tmp_path: Path, name: str, dump: str) -> None:
    path, canary, evil = checkpoints_in(folder)[2], tmp_path / "canary", tmp_path / "evil"
    if dump == "pickle":
        evil.write_bytes(pickle.dumps(Evil(canary)))
    else:
        torch.save(Evil(canary), evil)
    if name == "MANIFEST.json":
        (path / name).write_bytes(evil.read_bytes())
    else:
        rewrite(path, name, evil.read_bytes())
    assert_found_out(folder, name)
    assert not canary.exists()
    if dump == "pickle":
        pickle.loads(evil.read_bytes())  # the canary does sing
        assert canary.exists()


# A full disk


def test_whatever_call_the_disk_refuses_the_old_checkpoint_stands(tmp_path: Path) -> None:
    with Disk().watching() as disk:
        save(tmp_path, 1)
        disk.calls.clear()
        save(tmp_path, 2)
        sequence = disk.calls.copy()
        assert set(sequence) == {"fsync", "rename", "mkdir", "save_file", "open"}
        assert sequence.count("fsync") == len(FILES) + 2  # both folders, the outer one after the rename
        assert sequence[-3:] == ["fsync", "rename", "fsync"]
        for refused, call in enumerate(sequence, start=1):
            shutil.rmtree(checkpoints_in(tmp_path)[2])
            disk.calls.clear()
            disk.fatal = refused
            with pytest.raises(
                CheckpointError, match=r"step-000000002 could not be saved: No space left .*free"
            ):
                save(tmp_path, 2, keep=1)
            disk.fatal = 0
            assert hidden(tmp_path) == [], call
            assert_holds(checkpoints_in(tmp_path)[1], 1)
            save(tmp_path, 2)


@pytest.mark.parametrize("too_long", ["model.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("limit_bytes", [0, 3000])
def test_a_file_that_really_cannot_grow_costs_nothing(
    tmp_path: Path, too_long: str, limit_bytes: int
) -> None:
    many = 40 if too_long == "MANIFEST.json" else 1  # small files, but a long list of them
    tensors = {f"model{i}": {"w": torch.ones(9000 if "model" in too_long else 1)} for i in range(many)}
    state = {"notes": "x" * 9000 if too_long == "state.json" else ""}
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(CheckpointError, match="step-000000002 could not be saved: .*[Ff]ile too large"):
            save_checkpoint(tmp_path, 2, tensors, state, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(checkpoints_in(tmp_path)) == [1] and hidden(tmp_path) == []
    assert_holds(checkpoints_in(tmp_path)[1], 1)


def test_an_interrupted_atomic_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    atomic_write(path, "old")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left on device.*results.json'"):
        atomic_write(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    atomic_write(path, b"new")
    assert path.read_text() == "new"


# kill -9

SAVER = """
import os, signal, sys
import torch
from hldm.runs.checkpoints import save_checkpoint

def save(step):
    weight = torch.full((20_000,), step)
    save_checkpoint(sys.argv[1], step, {"model": {"w": weight}}, {"step": step}, keep=1)
    os.write(1, b"saved %d\\n" % step)

def die_before(name, fatal, calls=[0]):
    real = getattr(os, name)
    def call(*arguments, **options):
        calls[0] += 1
        if calls[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, call)

for line in sys.stdin:  # every order is carried out by a fork of its own, as importing torch takes seconds
    step, fatal = map(int, line.split())
    child = os.fork()
    if child == 0 and fatal:
        save(step + 1)
        for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
            die_before(name, fatal)
        save(step + 2)
        os._exit(0)
    while child == 0:
        save(step := step + 1)
    os.write(1, b"child %d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"gone 0\\n")
"""

Order = Callable[[int, int], Iterator[tuple[str, int]]]


@pytest.fixture
def order(tmp_path: Path) -> Iterator[Order]:
    """Have a process save the steps after one given: for ever, or two, dying at a call within the second."""
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert saver.stdin and saver.stdout
    stdin, stdout = saver.stdin, saver.stdout

    def answers(step: int, fatal: int) -> Iterator[tuple[str, int]]:
        stdin.write(f"{step} {fatal}\n")
        stdin.flush()
        while (answer := stdout.readline().split())[0] != "gone":
            yield answer[0], int(answer[1])

    yield answers
    stdin.close()
    saver.wait(timeout=20)
    stdout.close()


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, which must be whole, and so must any other."""
    checkpoint = newest_checkpoint(folder, pytest.fail)
    if checkpoint is None:
        return 0
    assert checkpoint.state == {"step": checkpoint.step}
    assert (checkpoint.tensors["model"]["w"] == checkpoint.step).all()
    return checkpoint.step


def test_kill_9_at_random_times_loses_nothing_acknowledged(tmp_path: Path, order: Order) -> None:
    draw = random.Random(0)
    step = acknowledged = 0
    for _ in range(20):
        for word, number in order(step, 0):
            if word == "child":
                time.sleep(draw.uniform(0, 0.15))
                os.kill(number, signal.SIGKILL)
            else:
                acknowledged = number
        step = newest_step(tmp_path)
        assert step >= acknowledged
    assert step > 20


def test_kill_9_before_each_call_of_a_save_loses_nothing_acknowledged(tmp_path: Path, order: Order) -> None:
    steps = []
    for fatal in range(1, 100):
        saved = [number for word, number in order(0, fatal) if word == "saved"]
        steps.append(newest_step(tmp_path))
        if 2 in saved:  # it lived to the end: the calls are exhausted
            break
        save(tmp_path, 3, keep=1)
        assert hidden(tmp_path) == []
        shutil.rmtree(tmp_path / "checkpoints")
    assert steps == sorted(steps) and steps.count(1) > 5 and steps.count(2) > 5


# Optimizers


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.95), amsgrad=True),
    "adamw, rate as tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "groups": lambda p: torch.optim.AdamW([{"params": [q], "lr": 0.1 / (i + 1)} for i, q in enumerate(p)]),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_resumed_optimizer_continues_as_if_it_had_not_stopped(
    tmp_path: Path, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 3, bias=False), torch.nn.Tanh(), torch.nn.Linear(3, 2, bias=False)
    ).double()
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    tensors, layout = flatten_optimizer(optimizer.state_dict())
    stored = {"model": model.state_dict(), "optimizer": tensors}
    back = load_checkpoint(save_checkpoint(tmp_path, 3, stored, {"optimizer": layout}, keep=1))
    train(model, optimizer, range(3, 6))

    resumed = torch.nn.Sequential(
        torch.nn.Linear(4, 3, bias=False), torch.nn.Tanh(), torch.nn.Linear(3, 2, bias=False)
    ).double()
    resumed.load_state_dict(back.tensors["model"])
    optimizer = make(resumed.parameters())
    state_dict = unflatten_optimizer(back.tensors["optimizer"], back.state["optimizer"])
    assert isinstance(state_dict["param_groups"][0].get("betas", ()), tuple)
    optimizer.load_state_dict(state_dict)
    train(resumed, optimizer, range(3, 6))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_optimizer_tensors_must_be_those_of_the_layout() -> None:
    tensors, layout = flatten_optimizer({"state": {0: {"mean": torch.ones(2)}}, "param_groups": []})
    assert tensors.keys() == {"optimizer.state.0.mean"}
    with pytest.raises(CheckpointError, match="optimizer.state.0.mean is missing"):
        unflatten_optimizer({}, layout)
    with pytest.raises(CheckpointError, match="does not know the tensors extra"):
        unflatten_optimizer(tensors | {"extra": torch.ones(1)}, layout)
    with pytest.raises(ValueError, match=r"optimizer.state.f cannot be stored: a function"):
        flatten_optimizer({"state": {"f": flatten_optimizer}})


# Fingerprints


def test_a_fingerprint_tells_weights_apart_and_nothing_else() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.bfloat16)}
    print_ = fingerprint(tensors)
    assert print_ == fingerprint({"b": tensors["b"].clone(), "a": tensors["a"].T.contiguous().T})
    others = [
        {"a": tensors["a"]},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"].reshape(3, 2), "b": tensors["b"]},
        {"a": tensors["a"].view(torch.int32), "b": tensors["b"]},
        {"a": tensors["a"] + 1e-6, "b": tensors["b"]},
    ]
    assert len({print_, *map(fingerprint, others)}) == 6
