"""Checkpoints that survive a kill, a full disk and a flipped bit; loading one never runs code.

A checkpoint is a folder of safetensors files and one state.json. MANIFEST.json, written last, lists the size and
sha256 of each. The folder is built under a temporary name on the same filesystem, synced to disk and renamed into
place; only then are older ones deleted. So a folder named `checkpoints/step-000000500` is either whole, or its damage
is detected. Knows no model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
from safetensors import SafetensorError

from hldm.runs.files import sha256_of, sync, write_synced
from hldm.runs.machine import free_disk

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 3  # of state.json and MANIFEST.json; a reader refuses any other
MANIFEST = "MANIFEST.json"
STATE = "state.json"
MAX_RECORD_BYTES = 100_000_000  # a state.json is small; the same cap as safetensors' own header
STEM = re.compile(r"[A-Za-z0-9_-]{1,64}")
LEFTOVER = re.compile(r"\.(?:tmp|del)-step-[0-9]+-([0-9]+)")  # ends with the process that made it


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and the reason."""


class Checkpoint(NamedTuple):
    """A checkpoint as loaded: `tensors` by file stem, then by name; `state` as it was saved."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, oldest first, valid or not. Other names are ignored."""
    home = Path(folder) / "checkpoints"
    found = {
        _step_of(path): path for path in (home.glob("step-*") if home.is_dir() else ()) if _is_folder(path)
    }
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    say: Callable[[str], None] = warnings.warn,
) -> Path:
    """Write `folder/checkpoints/step-<step>`, then delete all but the `keep` newest up to this step.

    tensors: file stem -> name -> tensor, e.g. {"model": {...}, "ema": {...}}; any strides, any device
    state:   whatever JSON gives back unchanged: string keys, lists rather than tuples, finite floats
    A valid checkpoint of this step is kept as it is; a damaged one is replaced. Checkpoints of later steps
    are left alone (a run that fell back to an older one meets them again). A delete that fails is only reported.
    Returns the checkpoint's folder. Raises ValueError for arguments that cannot be stored, CheckpointError
    when the disk refuses; earlier checkpoints are untouched then, and nothing temporary is left.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"a checkpoint needs step >= 0 and keep >= 1, got step {step} and keep {keep}")
    for stem in tensors:
        if not STEM.fullmatch(stem):
            raise ValueError(f"a file stem holds 1 to 64 of [A-Za-z0-9_-], got {stem!r}")
    record = _encode_state(step, state)

    home = Path(folder) / "checkpoints"
    target = home / f"step-{step:09d}"
    temporary = home / f".tmp-step-{step}-{os.getpid()}"
    try:
        if not home.is_dir():
            home.mkdir(parents=True)
            sync(home.parent)
        _remove_leftovers(home, say)
        damage = _damage_of(target)
        if damage:
            _write_files(temporary, tensors, record)
            if _is_folder(target):
                say(f"{damage}; replacing it by a new save of step {step}")
                _discard(target, say)
            os.rename(temporary, target)
        sync(home)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{target} could not be saved: {reason} ({free_disk(home)[0]:,} bytes free); "
            "earlier checkpoints are untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing there once it has been renamed

    for path in [path for saved, path in checkpoints_in(folder).items() if saved <= step][:-keep]:
        _discard(path, say)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after every size and sha256 of its manifest has been found right.

    The tensors are mapped from disk, on the CPU. Raises CheckpointError naming the file and the reason.
    """
    from safetensors.torch import load_file

    path = Path(path)
    files = _verify(path)
    record = _read_record(path / STATE)
    step, state = record.get("step"), record.get("state")
    if type(step) is not int or not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE} is damaged: it lacks a step or a state")
    if _step_of(path) not in (None, step):
        raise CheckpointError(f"{path} was renamed: it holds step {step}")
    tensors = {}
    for name in files:
        if name != STATE:
            try:
                tensors[name.removesuffix(".safetensors")] = load_file(path / name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path / name} is damaged: {error}") from error
    return Checkpoint(step, tensors, state, path)


def newest_checkpoint(folder: Path, say: Callable[[str], None] = warnings.warn) -> Checkpoint | None:
    """The newest valid checkpoint of a run; None when it never saved one.

    Reports each damaged one on the way. Raises CheckpointError when there are some and none is valid: a run
    must not silently start again from zero.
    """
    damages = []
    for path in reversed(checkpoints_in(folder).values()):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            damages.append(str(error))
            say(f"{error}; falling back to the checkpoint before it")
    if damages:
        raise CheckpointError(
            f"{folder} has no valid checkpoint left; choose another --name ({'; '.join(damages)})"
        )
    return None


def flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """A torch optimizer's state as tensors named "<parameter's number>.<name>", and its parameter groups as JSON."""
    tensors = {f"{i}.{name}": x for i, state in state_dict["state"].items() for name, x in state.items()}
    groups = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return tensors, groups


def unflatten_optimizer(tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Undo `flatten_optimizer`; the result is ready for `load_state_dict`."""
    state: dict[int, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        number, _, name = path.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    return {"state": state, "param_groups": groups}


def _write_files(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], record: bytes) -> None:
    """Everything of a checkpoint, the manifest last, synced to disk."""
    from safetensors.torch import save_file

    folder.mkdir()
    for stem, named_tensors in tensors.items():
        file = folder / f"{stem}.safetensors"
        save_file(_storable(named_tensors), file)
        sync(file)
    write_synced(folder / STATE, record)
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in sorted(folder.iterdir())}
    write_synced(folder / MANIFEST, _encode({"schema": SCHEMA, "files": files}))
    sync(folder)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each with memory of its own: safetensors refuses anything else."""
    storable: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        storable[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return storable


def _verify(path: Path) -> list[str]:
    """Check every file of a checkpoint against its manifest and return their names."""
    if not os.path.isfile(path / MANIFEST):
        raise CheckpointError(f"{path} is not a finished checkpoint: {MANIFEST} is missing")
    manifest = _read_record(path / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise CheckpointError(f"{path / MANIFEST} is damaged: it does not list {STATE}")
    if manifest.keys() != {"schema", "files"}:
        raise CheckpointError(f"{path / MANIFEST} is damaged: it says more than it should")
    for name, entry in files.items():
        stem, _, kind = name.partition(".")
        is_ours = name == STATE or (STEM.fullmatch(stem) and kind == "safetensors")
        if not (is_ours and isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"}):
            raise CheckpointError(f"{path / MANIFEST} is damaged: it lists {name!r}")
        file = path / name
        try:
            if not file.is_file():  # a FIFO would be read for ever
                raise CheckpointError(f"{file} is missing")
            size, expected_size = file.stat().st_size, entry.get("bytes")
            if size != expected_size:
                raise CheckpointError(f"{file} is damaged: {size} bytes instead of {expected_size}")
            if sha256_of(file) != entry.get("sha256"):
                raise CheckpointError(f"{file} is damaged: its sha256 is not the manifest's")
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    return list(files)


def _damage_of(path: Path) -> str:
    """Why a checkpoint cannot be used; empty when it is valid."""
    try:
        _verify(path)
    except CheckpointError as error:
        return str(error)
    return ""


def _read_record(path: Path) -> dict[str, Any]:
    """A JSON file that this module wrote; every byte must be as `_encode` writes it."""
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise CheckpointError(f"{path} is damaged: longer than {MAX_RECORD_BYTES:,} bytes")
        data = path.read_bytes()
        record = json.loads(data)
        is_ours = isinstance(record, dict) and "schema" in record and _encode(record) == data
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: not JSON of ours") from error
    if not is_ours:
        raise CheckpointError(f"{path} is damaged: not as it was written")
    if record["schema"] != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {record['schema']}, this hldm reads {SCHEMA}; use the hldm that wrote it"
        )
    return record


def _encode(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()


def _encode_state(step: int, state: dict[str, Any]) -> bytes:
    try:
        record = _encode({"schema": SCHEMA, "step": step, "state": state})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state of step {step} must be JSON: {error}") from error
    if len(record) > MAX_RECORD_BYTES:
        raise ValueError(
            f"the state of step {step} takes {len(record):,} bytes; large things belong in tensors"
        )
    if json.loads(record)["state"] != state:
        raise ValueError(f"the state of step {step} would change in JSON: use string keys, no tuples")
    return record


def _discard(path: Path, say: Callable[[str], None]) -> None:
    """Delete a checkpoint: out of sight by one rename first, so that a kill leaves no half of it."""
    doomed = path.with_name(f".del-{path.name}-{os.getpid()}")
    try:
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        say(f"{path} could not be deleted: {error.strerror}")


def _remove_leftovers(home: Path, say: Callable[[str], None]) -> None:
    """Delete what killed processes left half written or half deleted, but nothing of a process that is alive."""
    for path in home.glob(".*"):
        match = LEFTOVER.fullmatch(path.name)
        if match and _is_folder(path) and not _runs_elsewhere(int(match[1])):
            try:
                shutil.rmtree(path)
            except OSError as error:
                say(f"{path} could not be deleted: {error.strerror}")


def _runs_elsewhere(process: int) -> bool:
    """Whether another process of this number is alive."""
    return process != os.getpid() and process < 2**31 and psutil.pid_exists(process)


def _step_of(path: Path) -> int | None:
    """500 for `step-000000500`, None for any other name."""
    digits = path.name.removeprefix("step-")
    is_ours = re.fullmatch(r"[0-9]{9,18}", digits) and path.name == f"step-{int(digits):09d}"
    return int(digits) if is_ours else None


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
