"""A damaged checkpoint is found out, and none runs code."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hldm.runs.checkpoints import (
    CheckpointError,
    checkpoints_in,
    load_checkpoint,
    newest_checkpoint,
)
from hldm.runs.files import sha256_of
from tests.runs.saves import FILES, assert_holds, save

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


def rewrite(path: Path, name: str, data: bytes) -> None:
    """Replace a file and have the manifest vouch for it: what an attacker can do and an accident cannot."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    manifest["files"][name] = {"bytes": len(data), "sha256": sha256_of(path / name)}
    (path / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json"])
@pytest.mark.parametrize("schema", [0, 1, "2", None])
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
