"""A run's folder belongs to one process, keeps its settings, and is rewound when the run resumes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hldm.runs.checkpoints import save_checkpoint
from hldm.runs.folder import Run, check_run_name, open_run

CONFIG: dict[str, Any] = {
    "seed": 0,
    "autoencoder": {"latent_dim": 16, "blocks": ["recurrent", "attention"]},
    "training": {"learning_rate": 1e-5, "name": "1e-3"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "demo" / "autoencoder"


def opened(folder: Path, resume: bool = False, config: dict[str, Any] = CONFIG, **options: Any) -> Run:
    return open_run(folder, config=config, resume=resume, **options)


def steps_logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# The folder


def test_a_run_keeps_its_settings_and_its_environment(folder: Path) -> None:
    opened(folder).close()
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept == json.loads(json.dumps(CONFIG))
    opened(folder, resume=True).close()
    starts = json.loads((folder / "environment.json").read_text())
    assert len(starts) == 2
    assert starts[0]["argv"] == sys.argv and starts[0]["python"].startswith("3.")
    assert starts[0]["torch"] and starts[0]["threads"] >= 1 and starts[0]["memory_bytes"] > 1e6


def test_a_folder_in_use_is_not_reused_without_resume(folder: Path) -> None:
    opened(folder).close()
    with pytest.raises(
        ValueError, match="demo/autoencoder is not empty; pass --resume or choose another --name"
    ):
        opened(folder)
    save_checkpoint(folder, 500, {}, {}, keep=1)
    with pytest.raises(ValueError, match="autoencoder has a checkpoint at step 500; pass --resume or choose"):
        opened(folder)
    opened(folder, resume=True).close()


def test_nothing_to_resume_is_said(folder: Path) -> None:
    with pytest.warns(UserWarning, match="nothing to resume; starting from the beginning"):
        opened(folder, resume=True).close()


def test_resuming_with_another_model_is_refused_with_the_difference(folder: Path) -> None:
    opened(folder).close()
    before = (folder / "config.yaml").read_bytes()
    other = {"seed": 0, "autoencoder": {"latent_dim": 32, "blocks": ["recurrent"]}, "training": {"rate": 1}}
    with pytest.raises(ValueError) as refusal:
        opened(folder, resume=True, config=other, may_change=("training.",))
    assert str(refusal.value) == (
        f"{folder} was started with other settings (autoencoder.blocks ['recurrent', 'attention'] -> "
        "['recurrent'], autoencoder.latent_dim 16 -> 32); set them back or choose another --name"
    )
    assert (folder / "config.yaml").read_bytes() == before

    allowed = CONFIG | {"training": {"learning_rate": 2e-5}}
    opened(folder, resume=True, config=allowed, may_change=("training.",)).close()
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"] == {"learning_rate": 2e-5}


@pytest.mark.parametrize("changed", ["threads", "torch"])
def test_resuming_where_bits_may_differ_is_said(folder: Path, changed: str) -> None:
    opened(folder).close()
    starts = json.loads((folder / "environment.json").read_text())
    starts[-1][changed] = "other"
    (folder / "environment.json").write_text(json.dumps(starts))
    with pytest.warns(UserWarning, match=f"resumes elsewhere \\({changed} other -> "):
        opened(folder, resume=True).close()


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04cos\nsystem\n.", b"[" * 10_000, b"!!python/object/apply:os.mkdir ['canary']", b"- 1"],
)
def test_a_damaged_or_evil_file_is_named_and_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    opened(folder).close()
    monkeypatch.chdir(folder)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        opened(folder, resume=True)
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a b", "é", "x" * 65, "a\n", "$(x)"])
def test_a_name_that_is_more_than_a_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a run is named by"):
        check_run_name(name)
    if name in ("a b", "é", "$(x)"):
        with pytest.raises(ValueError, match="a run is named by"):
            opened(tmp_path / name / "prior")
    assert list(tmp_path.iterdir()) == []


def test_ordinary_names_pass() -> None:
    for name in ("demo", "tiny-2.1_b", "x" * 64, ".hidden", "..."):
        check_run_name(name)


def test_a_file_in_the_way_is_named(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("")
    with pytest.raises(ValueError, match="autoencoder cannot be used: File exists; choose another --name"):
        opened(folder)


def test_other_ranks_write_nothing(folder: Path) -> None:
    run = opened(folder, is_main=False)
    run.log(1, loss=1.0)
    run.sample(1, "text")
    run.rewind(0)
    run.close()
    assert not folder.exists()


# The lock


def test_a_second_run_is_told_who_owns_the_folder(folder: Path) -> None:
    run = opened(folder)
    run.log(1, loss=0.5)
    second = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from hldm.runs.folder import *; open_run({str(folder)!r}, config={{}}, resume=True)",
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert f"is in use by process {os.getpid()} on {os.uname().nodename}; wait until it" in second.stderr
    with pytest.raises(ValueError, match="is in use by"):
        opened(folder, resume=True)
    run.log(2, loss=0.5)
    assert steps_logged(folder) == [1, 2]
    run.close()
    opened(folder, resume=True).close()


def test_the_lock_of_a_killed_run_does_not_block_even_if_its_workers_live_on(folder: Path) -> None:
    owner = """
import os, sys, time
from hldm.runs.folder import open_run
run = open_run(sys.argv[1], config={}, resume=False)
worker = os.fork()
if worker == 0:
    sys.stdin.read()  # a data worker, outliving its parent
    os._exit(0)
print(worker, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", owner, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert process.stdout and process.stdin
    worker = int(process.stdout.readline())
    with pytest.raises(ValueError, match=f"is in use by process {process.pid}"):
        opened(folder, resume=True)
    process.kill()
    process.wait()
    os.kill(worker, 0)  # alive
    opened(folder, resume=True, config={}, say=lambda _: None).close()
    process.stdin.close()
    process.stdout.close()


def test_a_filesystem_without_locks_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available."):
        opened(folder).close()


# Metrics and samples


def test_every_line_of_metrics_is_json_whatever_the_number(folder: Path) -> None:
    run = opened(folder)
    run.log(1, loss=float("nan"), rate=float("inf"), name="é\n", done=True, best=None)
    run.close()
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    back = json.loads(line, parse_constant=pytest.fail)
    assert back == {"step": 1, "loss": "nan", "rate": "inf", "name": "é\n", "done": True, "best": None}


@pytest.mark.parametrize("torn", [b'{"step": 6, "lo', b'{"step": 3}', b"\0\0\0", b"7\n", b"", b'["step"]\n'])
def test_rewinding_drops_later_and_torn_lines(folder: Path, torn: bytes) -> None:
    said: list[str] = []
    run = opened(folder, say=said.append)
    for step in range(1, 6):
        run.log(step, loss=1 / step)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(torn)
    run.rewind(3)
    assert steps_logged(folder) == [1, 2, 3]
    assert len(said) == (torn != b"") and all("line 6, which is torn" in line for line in said)
    run.log(4, loss=0.0)
    assert steps_logged(folder) == [1, 2, 3, 4]
    run.rewind(-1)
    assert steps_logged(folder) == []
    run.close()


def test_rewinding_drops_later_samples_whatever_they_say(folder: Path) -> None:
    run = opened(folder)
    run.sample(1, "In the beginning\n=== step 9 ===\r\n")
    run.sample(2, "\udcff\x1b[0m")
    kept = (folder / "samples.txt").read_bytes()
    run.sample(3, "later")
    run.sample(4, "later")
    run.rewind(2)
    assert (folder / "samples.txt").read_bytes() == kept
    assert kept.startswith(b"=== step 1 ===\n    In the beginning\n    === step 9 ===\r\n")
    run.close()


def test_rewinding_a_run_that_wrote_nothing_is_fine(folder: Path) -> None:
    run = opened(folder)
    run.rewind(0)
    run.close()
    assert not (folder / "metrics.jsonl").exists()
