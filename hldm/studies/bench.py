"""`hldm bench`: how fast both stages and the twin train and write on this machine, and where the time goes.

Whatever is compared is measured in turns, a piece of each again and again (speeds on a shared machine wander by tens of
per cent from minute to minute), and every figure stands beside its twin's. Models are untrained: a step costs the same
whatever it has learned. Under `accelerate launch` training is measured on all processes together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from hldm.config import Config, ConfigError
from hldm.evaluation.tables import Table
from hldm.plugins import allow_named
from hldm.runs.provenance import describe_environment
from hldm.studies import bench_training, bench_writing


def measure(
    config: Config, twin: Config, *, steps: int = 10, only: str | None = None, long: bool = False
) -> dict[str, Any]:
    """Everything about a config and its twin, as plain numbers. `report` makes tables of it.

    only: "training" or "writing";  long: also after long prompts
    Raises ConfigError unless the one has latents and the other has none; and for writing on several processes.
    """
    allow_named(config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and only != "training":
        raise ConfigError(
            f"{processes} processes can train together, each writes on its own: --only training"
        )
    if config.is_twin or not twin.is_twin:
        raise ConfigError(
            f"a bench needs a config with latents and a twin without, got autoencoder.latent_dim "
            f"{config.autoencoder.latent_dim} in {config.name} and {twin.autoencoder.latent_dim} in {twin.name}"
        )
    # else the profiler tells standard error whenever it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.manual_seed(config.seed)
    parts = {
        "stage one": (config, "autoencoder"),
        "stage two": (config, "prior"),
        "twin": (twin, "autoencoder"),
    }
    stages = {name: bench_training.trainer_of(*part) for name, part in parts.items()}
    accelerator = stages["twin"].accelerator
    environment = describe_environment()
    machine = {name: environment[name] for name in ("cpu", "cores", "threads", "torch", "platform", "commit")}
    found: dict[str, Any] = {
        "machine": {**machine, "device": str(accelerator.device), "processes": processes},
        "config": config.name,
        "steps": steps,
        "bytes_per_step": config.data.lanes * config.data.window_bytes,
    }
    if only != "writing":
        found |= bench_training.measure(stages, steps)
        accelerator.end_training()
    if only != "training":
        two, plain = stages["stage two"].objective, stages["twin"].objective
        windows, _ = bench_training.text_of(config.data, config.chunking, config.seed)
        corpus = windows.corpus
        for objective in (two, plain):
            bench_writing.write_like(objective.eval().autoencoder, corpus, windows.chunks)
        model = bench_writing.contestant(two.autoencoder, two.prior, config, corpus)
        contestants = {
            "model": model,
            "twin": bench_writing.contestant(plain.autoencoder, None, twin, corpus),
            "GPT-2": bench_writing.gpt2_contestant(model.parameters, corpus, accelerator.device),
        }
        found["generation"] = bench_writing.measure(contestants, long=long)
    return found


def report(found: Mapping[str, Any]) -> list[str | Table]:
    """What `measure` found: a head, and the tables."""
    machine = found["machine"]
    head = f"{machine['cpu']}, {machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}"
    if machine["processes"] > 1:
        head += f", {machine['processes']} processes"
    tables = []
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
