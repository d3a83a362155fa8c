"""Extreme settings: refused in one line, or a training and a text with nothing that is not finite in them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hldm.training.stages  # noqa: F401 - here, not in every child
from hldm import cli
from hldm.config import ConfigError, load_config, to_dict
from hldm.settings import dotted
from tests.conftest import ROOT, SMALL
from tests.tiny_model import tiny_pipeline
from tests.torture import children, small
from tests.torture.trial import Trial

VALUES = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "-0.0",
    "0",
    "1e-320",
    "1e-30",
    "1e8",
    "1e20",
    "1e38",
    "1e308",
    "1e999",
    "junk",
)
WRITING = (
    "--guidance",
    "--temperature",
    "--decoder-temperature",
    "--top-p",
    "--steps",
    "--seed",
    "--max-characters",
)
# Those that end a training in a line of their own: bad input, numbers that stay not finite, out of memory.
ENDS = {0: "done", 2: "refused", 3: "not finite", 4: "out of memory"}
PARTS = (
    "autoencoder.",
    "chunking.",
    "data.",
    "diffusion.",
    "hierarchy.",
    "prior.",
    "training.",
    "checkpoint.",
)
SECONDS = 240


def numbers(config: dict[str, Any]) -> Iterator[str]:
    """Keys of the settings that are numbers, of stage one or both."""
    for key, value in dotted(config).items():
        if type(value) in (int, float) and key.startswith(PARTS) and not key.startswith("training.prior"):
            yield key


def torture(trial: Trial) -> None:
    tiny_pipeline().save_pretrained(trial.folder / "pipeline")
    text = small.write_text(trial.folder)
    ends: dict[str, int] = {}
    for option, value in trial.sample([(option, value) for option in WRITING for value in VALUES]):
        log = trial.folder / "log"
        log.unlink(missing_ok=True)
        status = children.wait(children.fork(writer(trial.folder, option, value), log), SECONDS)
        record(trial, f"{option} {value}", status, log.read_text(errors="replace"), ends)
    keys = list(numbers(to_dict(load_config([ROOT / "configs/tiny.yaml"]))))
    for number, (key, value) in enumerate(trial.sample([(key, value) for key in keys for value in VALUES])):
        override = f"{key}={value}"
        try:
            load_config([ROOT / "configs/tiny.yaml"], [*SMALL, override])
        except ConfigError as error:
            wrong = (
                []
                if key.split(".")[-1] in str(error) and "\n" not in str(error)
                else [f"told badly: {error}"]
            )
            trial.record(override, wrong)
            ends["refused"] = ends.get("refused", 0) + 1
            continue
        folder = small.start_folder(trial.folder / f"{number}", "autoencoder")
        steps = [] if key == "training.autoencoder.steps" else ["training.autoencoder.steps=2"]
        work = small.train(folder, text, "autoencoder", small.UNSAVED, *steps, override)
        status = children.wait(children.fork(work, folder / "log"), SECONDS)
        said = (folder / "log").read_text(errors="replace")
        record(trial, override, status, said, ends, long=key.endswith((".steps", ".minutes")))
    trial.note = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))


def writer(folder: Path, option: str, value: str) -> Any:
    """The work of a child that writes with one setting."""
    words = ["generate", "--run", "pipeline", "--prompt", "And", option, value]
    words += [] if option == "--max-characters" else ["--max-characters", "9"]

    def work() -> int:
        os.chdir(folder)
        return cli.main(words)

    return work


def record(
    trial: Trial, injection: str, status: int, said: str, ends: dict[str, int], long: bool = False
) -> None:
    """Record one end. A text holds no number; a training logs every step's.  long: it may go on as long as it likes."""
    wrong = ["a traceback"] if "Traceback" in said else []
    if status == children.HUNG and long:
        end = "going on"
    elif status not in ENDS:
        end = "broken"
        wrong.append(f"ended with {status}: {said[-500:]}")
    else:
        end = ENDS[status]
        lines = [line for line in said.splitlines() if line.startswith("hldm: ")]
        if status and len(lines) != 1:
            wrong.append(f"told badly: {said[-500:]}")
        shown = [
            word for line in said.splitlines() if "bits/char" in line for word in line.split() if is_odd(word)
        ]
        if not status and shown:
            wrong.append(f"done, with {shown[0]}: {said[-300:]}")
    ends[end] = ends.get(end, 0) + 1
    trial.record(injection, wrong)


def is_odd(word: str) -> bool:
    """Whether a word is a number that is not finite."""
    try:
        return not math.isfinite(float(word.strip("()")))
    except ValueError:
        return False
