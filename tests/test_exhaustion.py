"""Memory or disk run out while hldm is at work: one line that names what and where, and nothing saved is lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError

from hldm import cli
from hldm.config import to_yaml
from hldm.runs.checkpoints import newest_checkpoint
from hldm.runs.folder import Totals, open_run, write_totals
from hldm.runs.reports import save_report
from hldm.training import stage, stages

FULL = re.escape(os.strerror(errno.ENOSPC)) + r" \([0-9,]+ bytes free\)"


def settings(run: Path):
    return open_run(run, config={"data": {"lanes": 1}}, resume=True, say=lambda _: None)


class Model:
    """Something that is exported."""

    def save_pretrained(self, path: str) -> None:
        Path(path).mkdir()
        (Path(path) / "weights").write_bytes(b"new" * 100_000)


# ---- the disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte; a function fills it to the last byte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if (
        os.geteuid() != 0
        or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("needs root, to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    with open(place / "filler", "wb", buffering=0) as file:
        for size in (2**16, 2**8, 1):
            try:
                while True:
                    file.write(b"0" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC


def test_whatever_is_written_to_a_full_disk_says_so_and_leaves_the_old_files_intact(small_disk):
    run = settings(small_disk / "runs/name/autoencoder")
    run.log(1, loss=1.0)
    run.sample(1, "text")
    run.close()
    export = small_disk / "model"
    stage.export(Model(), export)
    table = small_disk / "evaluation.json"
    save_report(table, {"bits": 2.0})
    run = settings(run.folder)
    before = contents(small_disk)
    fill(small_disk)
    # a file may have some room left in its last page, so what is written is longer than one
    writes = {
        "metrics.jsonl": lambda: run.log(2, text="x" * 10_000),
        "samples.txt": lambda: run.sample(2, "x" * 10_000),
        "model": lambda: stage.export(Model(), export),
        "evaluation.json": lambda: save_report(table, {"bits": 3.0}),
        "config.yaml": lambda: (run.close(), settings(run.folder)),
    }
    for name, write in writes.items():
        with pytest.raises(OSError, match=FULL) as error:
            write()
        assert Path(error.value.filename).name == name
    after = contents(small_disk)
    after.pop("filler")
    for name in ("metrics.jsonl", "samples.txt"):  # appended to, perhaps torn; `rewind` drops what is
        key = f"runs/name/autoencoder/{name}"
        assert after.pop(key).startswith(before.pop(key))
    assert after == before


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def test_training_on_a_disk_that_fills_up_ends_in_one_line_and_keeps_its_checkpoints(
    small_disk, small_config, monkeypatch, capsys
):
    (small_disk / "small.yaml").write_text(to_yaml(small_config))
    monkeypatch.chdir(small_disk)
    monkeypatch.setattr(stages, "require_room", lambda *_: None)  # it would have refused
    assert cli.train_autoencoder(["--config", "small.yaml", "checkpoint.keep=9", "checkpoint.every=1"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"hldm: runs/small/.*bytes free\).*\n", error), error
    saved = newest_checkpoint(Path("runs/small/autoencoder"))
    assert saved is not None and saved.step >= 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_a_log_on_a_full_device_is_named(name, tmp_path):
    run = settings(tmp_path / "runs/name/autoencoder")
    (run.folder / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=FULL) as error:
        run.log(1, loss=1.0) if name == "metrics.jsonl" else run.sample(1, "text")
    assert error.value.filename == str(run.folder / name)
    run.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_file_that_cannot_be_synced_leaves_the_old_one(number, tmp_path, monkeypatch):
    table = tmp_path / "evaluation.json"
    save_report(table, {"bits": 2.0})
    write_totals(tmp_path, Totals())
    before = contents(tmp_path)

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    for path, write in (
        (table, lambda: save_report(table, {})),
        (tmp_path / "totals.json", lambda: write_totals(tmp_path, Totals(steps=1))),
    ):
        with pytest.raises(OSError, match=r"bytes free\)") as error:
            write()
        assert (error.value.errno, error.value.filename) == (number, str(path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        OSError(28, "No space left on device"),
    ],
)
def test_an_export_that_fails_leaves_the_old_one_alone(error, tmp_path):
    class Failing:
        def save_pretrained(self, path: str) -> None:
            Path(path).mkdir()
            raise error

    stage.export(Model(), tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(OSError, match=FULL):
        stage.export(Failing(), tmp_path / "model")
    assert contents(tmp_path) == before and not (tmp_path / "model.new").exists()


# ---- a start that fails


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        (None, "training.accumulation=3"),
        ("hldm.runs.folder.write_environment", "seed=1"),
        ("hldm.training.trainer.make_optimizers", "seed=1"),
    ],
)
def test_a_start_that_fails_does_not_use_up_the_name(
    where, wrong, small_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(to_yaml(small_config))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs")

    with monkeypatch.context() as patched:
        if where:
            patched.setattr(where, fail)
        assert cli.train_autoencoder(["--config", "small.yaml", wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path("runs/small").exists()
    assert cli.train_autoencoder(["--config", "small.yaml", "--steps", "1"]) == 0
    capsys.readouterr()
    # what has been trained is never removed, whatever fails
    saved = contents(Path("runs"))
    assert cli.train_autoencoder(["--config", "small.yaml", "--resume", "training.accumulation=3"]) == 2
    assert contents(Path("runs")).keys() == saved.keys()


# ---- memory

LIMITED = """
import psutil, resource, sys
from hldm import cli
from hldm.training import stages

def limit(*_):  # comes once the check is over: other programs take what was free
    most = psutil.Process().memory_info().vms + 80 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

stages.require_room = limit
sys.exit(cli.train_autoencoder(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc of Linux")
def test_memory_that_runs_out_in_a_step_ends_in_one_line_and_keeps_the_checkpoint(corpus_path, tmp_path):
    settings = ["--config", str(ROOT / "configs/tiny.yaml"), f"data.path={corpus_path}", "checkpoint.every=1"]
    command = [str(ROOT / "train_autoencoder.py"), *settings, "--steps", "1"]
    places = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], cwd=tmp_path, env=places, check=True)
    folder = tmp_path / "runs/tiny/autoencoder"
    before = contents(folder / "checkpoints")
    command = ["-c", LIMITED, *settings, "--resume", "--steps", "3"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=places, capture_output=True, text=True
    )
    assert done.returncode == 4, done.stderr
    *notes, said = done.stderr.splitlines()
    assert all(note.startswith("note: ") for note in notes) and said.startswith("hldm: out of memory (")
    assert "go on with --resume" in said
    assert contents(folder / "checkpoints") == before
    assert newest_checkpoint(folder) is not None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("unable to mmap 100 bytes from file <a>: Cannot allocate memory (12)"),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_way_of_running_out_of_memory_is_exit_code_4(error, capsys):
    def work() -> int:
        raise error

    assert cli.guarded(work) == 4
    said = capsys.readouterr().err
    assert said.startswith("hldm: out of memory (") and said.count("\n") == 1
