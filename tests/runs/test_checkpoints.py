"""Checkpoints come back bit for bit, optimizers included, and only as many are kept as were asked for."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hldm.runs.checkpoints import (
    CheckpointError,
    checkpoints_in,
    flatten_optimizer,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    unflatten_optimizer,
)
from hldm.runs.files import fingerprint
from tests.runs.saves import assert_holds, bits, hidden, save

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


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


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match="absent is not a finished checkpoint"):
        load_checkpoint(tmp_path / "absent")


# Optimizers


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.95), amsgrad=True),
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
    tensors, groups = flatten_optimizer(optimizer.state_dict())
    stored = {"model": model.state_dict(), "optimizer": tensors}
    back = load_checkpoint(save_checkpoint(tmp_path, 3, stored, {"optimizer": groups}, keep=1))
    train(model, optimizer, range(3, 6))

    resumed = torch.nn.Sequential(
        torch.nn.Linear(4, 3, bias=False), torch.nn.Tanh(), torch.nn.Linear(3, 2, bias=False)
    ).double()
    resumed.load_state_dict(back.tensors["model"])
    optimizer = make(resumed.parameters())
    state_dict = unflatten_optimizer(back.tensors["optimizer"], back.state["optimizer"])
    optimizer.load_state_dict(state_dict)
    train(resumed, optimizer, range(3, 6))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
