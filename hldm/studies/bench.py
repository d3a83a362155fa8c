"""`hldm bench`: how fast both stages and the twin train and write on this machine, and where the time goes.

Whatever is compared is measured in one process and in turns, a piece of each again and again, and every figure stands
beside its twin's. Models are untrained: a step costs the same whatever it has learned. Here are the
tables' heads; `bench_training`, `bench_writing`, `bench_layers` and `bench_processes` measure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hldm.chunking.strategies import attach_segmenter
from hldm.config import Config, ConfigError
from hldm.evaluation.tables import Table
from hldm.runs.folder import describe_environment
from hldm.sources.corpora import load_corpus
from hldm.studies import bench_processes, bench_training, bench_writing


def measure(
    config: Config, twin: Config, *, steps: int = 10, only: str | None = None, long: bool = False
) -> dict[str, Any]:
    """Everything about a config and its twin, as plain numbers. `report` makes tables of it.

    only: "training" or "writing";  long: also after long prompts
    Raises ConfigError unless the one has latents and the other has none.
    """
    if config.is_twin or not twin.is_twin:
        raise ConfigError(
            f"a bench needs a config with latents and a twin without, got autoencoder.latent_dim "
            f"{config.autoencoder.latent_dim} in {config.name} and {twin.autoencoder.latent_dim} in {twin.name}"
        )
    # else the profiler tells standard error whenever it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    corpora = {data: load_corpus(data, "train") for data in {config.data, twin.data}}
    corpus = corpora[config.data]
    torch.manual_seed(config.seed)
    segmenters = {
        part.chunking: bench_training.quick_segmenter(part, corpora[part.data]) for part in (config, twin)
    }
    windows = bench_training.windows_of(config, corpus, segmenters[config.chunking])
    twin_windows = bench_training.windows_of(twin, corpora[twin.data], segmenters[twin.chunking])
    one, two = bench_training.stage_one(config), bench_training.stage_two(config, windows)
    plain = bench_training.stage_one(twin)
    stages = {}
    for name, part, stage, objective, text in (
        ("stage one", config, "autoencoder", one, windows),
        ("stage two", config, "prior", two, windows),
        ("twin", twin, "autoencoder", plain, twin_windows),
    ):
        segmenter = segmenters[part.chunking]
        if segmenter is not None:
            attach_segmenter(objective.autoencoder, segmenter)
        stages[name] = bench_training.trainer_of(part, stage, objective, text)
    device = stages["twin"].accelerator.device
    found = _head(config, steps, str(device))
    if only != "writing":
        found |= bench_training.measure(stages, steps)
    if only != "training":
        for autoencoder in (two.autoencoder, plain.autoencoder):
            bench_writing.write_like(autoencoder, corpus, windows.chunks)
        two.eval()
        plain.eval()
        model = bench_writing.contestant(two.autoencoder, two.prior, config, corpus)
        contestants = {
            "model": model,
            "twin": bench_writing.contestant(plain.autoencoder, None, twin, corpus),
            "GPT-2": bench_writing.gpt2_contestant(model.parameters, corpus, device),
        }
        found["generation"] = bench_writing.measure(contestants, long=long)
    return found


def measure_processes(config: Config, *, steps: int = 10, launch: Path | None = None) -> dict[str, Any]:
    """Stage one on one process beside several, started by accelerate with the file `launch`."""
    found = bench_processes.measure(config, steps, launch or bench_processes.TWO_PROCESSES)
    return {**_head(config, steps, found["one process"]["device"]), "processes": found}


def _head(config: Config, steps: int, device: str) -> dict[str, Any]:
    """What was measured, and on what."""
    environment = describe_environment()
    machine = {name: environment[name] for name in ("cpu", "cores", "threads", "torch", "platform", "commit")}
    return {
        "machine": {**machine, "device": device},
        "config": config.name,
        "steps": steps,
        "bytes_per_step": config.data.lanes * config.data.window_bytes,
    }


def report(found: Mapping[str, Any]) -> list[str | Table]:
    """What `measure` found: a head, and the tables."""
    machine = found["machine"]
    head = f"{machine['cpu']}, {machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}"
    tables = []
    if "processes" in found:
        head += (
            f"\n{found['config']}: {found['bytes_per_step']:,} bytes a step, {found['steps']} steps a turn"
        )
        tables.append(bench_processes.report(found["processes"]))
    if "training" in found:
        n = bench_training.GEMM_SIZE
        head += (
            f"\nfloat32 matrix products of {n}^3 reach {found['gemm_gflops']:,.1f} GFLOP/s: the peak below"
            f"\n{found['config']}: {found['bytes_per_step']:,} bytes a step, {found['steps']} steps of each, in turns"
        )
        tables.append(bench_training.report(found["training"]))
    if "generation" in found:
        tables.append(bench_writing.report(found["generation"]))
    return [head, *tables]
