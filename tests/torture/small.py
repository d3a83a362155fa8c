"""A run small enough to be killed hundreds of times: milliseconds a step, a fifth of a second to resume."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hldm import cli
from hldm.config import DataConfig
from hldm.runs.checkpoints import CheckpointError, newest_checkpoint
from hldm.runs.files import fingerprint, sha256_of
from hldm.sources.corpora import load_corpus
from tests.conftest import ROOT, SMALL
from tests.torture import children

STAGES = ("autoencoder", "prior")
SCRIPTS = {"autoencoder": ROOT / "train_autoencoder.py", "prior": ROOT / "train_diffusion.py"}
TRAIN = {"autoencoder": cli.train_autoencoder, "prior": cli.train_diffusion}
UNSAVED = "checkpoint.every=100000"  # no saves but the last one: nothing stops this run
STEPS = 24  # more than two epochs of the text below


def write_text(folder: Path) -> Path:
    """Twelve short documents of the built-in text."""
    text = load_corpus(DataConfig(), "validation").text[:4800].tobytes().decode()
    path = folder / "text.txt"
    path.write_text("\n\n".join(text[i : i + 400] for i in range(0, 4800, 400)))
    return path


def arguments(text: Path, stage: str, *overrides: str, resume: bool = False) -> list[str]:
    """The command line of a stage, as a user would type it; it saves and logs every step."""
    settings = [*SMALL, f"data.path={text}", 'data.separator="\\n\\n"', "checkpoint.every=1"]
    settings += [f"training.{stage}.steps={STEPS}", *overrides]
    flags = ["--config", str(ROOT / "configs/tiny.yaml"), "--name", "small"]
    return [*flags, *settings, *(["--resume"] if resume else [])]


def train(folder: Path, text: Path, stage: str, *overrides: str, resume: bool = False) -> Callable[[], int]:
    """The work of a child that trains a stage in folder/runs/small."""

    def work() -> int:
        os.chdir(folder)
        return TRAIN[stage](arguments(text, stage, *overrides, resume=resume))

    return work


def stage_folder(folder: Path, stage: str) -> Path:
    return folder / "runs" / "small" / stage


def start_folder(folder: Path, stage: str, straight: Path | None = None) -> Path:
    """A new folder to train `stage` in; for the prior with the autoencoder of `straight`."""
    folder.mkdir(parents=True)
    if stage == "prior":
        assert straight is not None
        source, target = (stage_folder(root, "autoencoder") for root in (straight, folder))
        for part in ("model", "rate"):
            shutil.copytree(source / part, target / part)
        shutil.copyfile(source / "config.yaml", target / "config.yaml")
    return folder


def train_straight(folder: Path, text: Path, stages: tuple[str, ...] = STAGES, *overrides: str) -> Path:
    """Uninterrupted runs, to compare with. Raises RuntimeError when one does not end well."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        log = folder / f"{stage}.log"
        code = children.run(train(folder, text, stage, UNSAVED, *overrides), log)
        if code:
            raise RuntimeError(
                f"the uninterrupted run of {stage} ended with {code}:\n{log.read_text()[-2000:]}"
            )
    return folder


def outcome(folder: Path, stage: str) -> dict[str, str]:
    """Fingerprints of everything that a finished stage leaves: weights, optimizers, average, carries, export."""
    checkpoint = newest_checkpoint(stage_folder(folder, stage))
    if checkpoint is None:
        return {}
    exported = stage_folder(folder, stage) / "model" / "diffusion_pytorch_model.safetensors"
    prints = {stem: fingerprint(tensors) for stem, tensors in checkpoint.tensors.items()}
    return {"step": str(checkpoint.step), "exported": sha256_of(exported), **prints}


def differences(folder: Path, other: Path, stage: str) -> list[str]:
    """What two finished runs differ in; empty when they are equal to the bit, and every step is logged once."""
    a, b = outcome(folder, stage), outcome(other, stage)
    wrong = [
        f"{name} differs from the uninterrupted run's"
        for name in sorted({*a, *b})
        if a.get(name) != b.get(name)
    ]
    if [line["step"] for line in metrics(folder, stage)] != [line["step"] for line in metrics(other, stage)]:
        wrong.append("metrics.jsonl has other steps than the uninterrupted run's")
    return wrong


def metrics(folder: Path, stage: str, events: bool = True) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl, with those of events or without."""
    path = stage_folder(folder, stage) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [line for line in found if events or "event" not in line]


def newest_step(folder: Path, stage: str, wrong: list[str]) -> int:
    """The step of the newest checkpoint, 0 for none; a damaged one, which no kill may leave, is wrong."""
    try:
        checkpoint = newest_checkpoint(stage_folder(folder, stage), wrong.append)
    except CheckpointError as error:
        wrong.append(str(error))
        return 0
    return checkpoint.step if checkpoint else 0


def leftovers(folder: Path, stage: str) -> list[str]:
    """What lies half written or half deleted among the checkpoints."""
    return [path.name for path in (stage_folder(folder, stage) / "checkpoints").glob(".*")]
