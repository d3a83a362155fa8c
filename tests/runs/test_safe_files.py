"""A file is replaced whole or not at all; digests tell contents apart."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hldm.runs.files import atomic_write, fingerprint


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
