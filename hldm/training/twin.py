"""The autoregressive twin of a config: what it takes over from its model, and one made where no file says one.

A twin reads the same text for the same minutes with as many parameters, without latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from hldm.config import (
    ChunkingConfig,
    Config,
    GriffinConfig,
    changed,
    find_config,
    load_config,
    stage_training,
)
from hldm.runs.identity import check_pair
from hldm.training.sizes import count, untrained

# Of the command line, what is the model's alone: a twin has another shape, and its file says which.
OF_THE_MODEL = ("autoencoder.", "chunking.", "hierarchy.", "diffusion.", "prior.", "name=")
SEEN = 64  # bytes back that its attention sees at least, as in configs/small-twin.yaml
MAX_BLOCKS = 64


def twin_of(config: Config, path: Path, overrides: Sequence[str] = ()) -> Config:
    """The twin that belongs to a resolved config, for as long as both of its stages.

    path: the config's file; NAME-twin.yaml beside it says the twin's shape, where there is one
    overrides: the config's; those of its model's shape are not the twin's
    Raises ConfigError where the twin's file names another text.
    """
    path = find_config(path)  # tiny: that of hldm
    beside = path.with_name(f"{path.stem}-twin{path.suffix}")
    if beside.is_file():
        twin = load_config(beside, [o for o in overrides if not o.startswith(OF_THE_MODEL)])
        check_pair(config, path, twin, beside)
    else:
        twin = made(config)
    stages = config.training.autoencoder, config.training.prior
    minutes = [stage.minutes for stage in stages]
    return stage_training(
        changed(twin, name=f"{config.name}-twin"),
        "autoencoder",
        minutes=sum(minutes) if all(minutes) else 0.0,
        steps=min(sum(stage.steps for stage in stages), 2**62),
    )


def made(config: Config) -> Config:
    """A twin in the shape of configs/*-twin.yaml: two recurrent blocks to one of attention, as many as fit best."""
    seen = min(max(SEEN, config.chunking.max_bytes), config.data.window_bytes // 2)
    chunking = ChunkingConfig(strategy="fixed", min_bytes=1, max_bytes=seen)
    stages = ("autoencoder",) if config.is_twin else ("autoencoder", "prior")
    wanted = sum(numbers(config, stage) for stage in stages)
    pattern = ("recurrent", "recurrent", "attention") * MAX_BLOCKS

    def with_blocks(blocks: int) -> Config:
        decoder = GriffinConfig(**vars(config.autoencoder.encoder) | {"blocks": pattern[:blocks]})
        autoencoder = changed(config.autoencoder, latent_dim=0, carry_state=True, decoder=decoder)
        return changed(config, chunking=chunking, autoencoder=autoencoder)

    def off(candidate: Config) -> int:
        return abs(numbers(candidate, "autoencoder") - wanted)

    best = with_blocks(1)
    for blocks in range(2, MAX_BLOCKS + 1):
        candidate = with_blocks(blocks)
        if off(candidate) >= off(best):
            break
        best = candidate
    return best


@lru_cache(maxsize=128)
def numbers(config: Config, stage: str) -> int:
    """Parameters of a stage's own model, counted without memory."""
    with torch.device("meta"):
        objective = untrained(config, stage)
    return count(getattr(objective, stage))
