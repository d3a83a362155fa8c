"""Checkpoints that tests of this room save and look at."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hldm.runs.checkpoints import (
    load_checkpoint,
    save_checkpoint,
)

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
