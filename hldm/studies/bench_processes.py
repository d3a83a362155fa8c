"""`hldm bench --only processes`: stage one on one process, and on as many as a file of configs/accelerate starts.

The same batch and as many threads in all. Each turn starts both anew, through accelerate's launcher where there are
several, one after the other; what starting takes is not counted. What the processes run is this module's `main`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hldm.config import Config, ConfigError, load_config, to_yaml
from hldm.evaluation.tables import Table, row
from hldm.sources.corpora import load_corpus
from hldm.studies.bench_training import stage_one, time_steps, trainer_of, windows_of

TWO_PROCESSES = Path("configs/accelerate/two_processes.yaml")
TURNS = 3


def measure(config: Config, steps: int, launch: Path = TWO_PROCESSES) -> dict[str, dict[str, Any]]:
    """Characters per second of one process and of those that accelerate launches, in turns.

    steps: timed, of each in a turn. The ratio is the median over turns.
    Raises FileNotFoundError for a launch file that is not there, ConfigError when the processes fail.
    """
    if not launch.is_file():
        raise FileNotFoundError(f"{launch}: no such file, start hldm in its repository or pass --launch FILE")
    python = [sys.executable, "-m"]
    # port 0: any that is free
    accelerate = [
        *python,
        "accelerate.commands.launch",
        "--config_file",
        str(launch),
        "--main_process_port",
        "0",
        "-m",
    ]
    turns: dict[str, list[dict[str, Any]]] = {"one process": [], "launched": []}
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{config.name}.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        for _ in range(TURNS):
            for launcher, turn in zip((python, accelerate), turns.values(), strict=True):
                turn.append(_run(launcher, path, steps))
    rates = {name: [found["characters_per_second"] for found in turn] for name, turn in turns.items()}
    return {
        name: {
            **{key: turn[0][key] for key in ("processes", "threads", "device")},
            "characters_per_second": statistics.median(rates[name]),
            "characters_per_second_best": max(found["characters_per_second_best"] for found in turn),
            "seconds_per_step": statistics.median(found["seconds_per_step"] for found in turn),
            "ratio_to_one": statistics.median(
                a / b for a, b in zip(rates[name], rates["one process"], strict=True)
            ),
        }
        for name, turn in turns.items()
    }


def _run(launcher: Sequence[str], config: Path, steps: int) -> dict[str, Any]:
    """What `main` measured, started so. Raises ConfigError with its last line when it fails."""
    found = config.with_name("found.json")
    found.unlink(missing_ok=True)
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [*launcher, "hldm.studies.bench_processes", str(config), str(steps), threads, str(found)],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not found.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        # hldm's own line, before what the launcher makes of it
        reason = next((line for line in said if line.startswith("hldm: ")), said[-1])
        raise ConfigError(f"{' '.join(launcher)} hldm.studies.bench_processes failed: {reason}")
    return json.loads(found.read_text(encoding="utf-8"))


def main(arguments: Sequence[str]) -> None:
    """One of the processes: CONFIG STEPS THREADS TARGET.

    THREADS: of all of them together;  TARGET: where the first one writes what was measured, as JSON
    """
    path, steps, threads, target = arguments
    torch.set_num_threads(max(int(threads) // int(os.environ.get("WORLD_SIZE", "1")), 1))
    config = load_config(path)
    torch.manual_seed(config.seed)
    windows = windows_of(config, load_corpus(config.data, "train"))
    trainer = trainer_of(config, "autoencoder", stage_one(config), windows)
    accelerator = trainer.accelerator
    found = {
        **time_steps({"stage one": trainer}, int(steps))["stage one"],
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": str(accelerator.device.type),
    }
    if accelerator.is_main_process:
        Path(target).write_text(json.dumps(found), encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def report(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `measure` found."""
    rows = [
        row("processes", ",.0f", found, "processes"),
        row("threads of each", ",.0f", found, "threads"),
        row("stage one, characters per second", ",.0f", found, "characters_per_second"),
        row("  the best step", ",.0f", found, "characters_per_second_best"),
        row("  over one process", ".2f", found, "ratio_to_one"),
        row("milliseconds a step", ",.1f", found, "seconds_per_step", scale=1e3),
    ]
    return Table(["training", *found], rows)


if __name__ == "__main__":
    from hldm.runs.exits import guarded

    def work() -> int:
        main(sys.argv[1:])
        return 0

    sys.exit(guarded(work))
