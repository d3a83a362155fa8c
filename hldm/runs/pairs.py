"""A config and its autoregressive twin, NAME-twin.yaml beside it, under the same overrides of the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hldm.config import Config, ConfigError, load_config
from hldm.runs.identity import check_pair
from hldm.settings import parse_override

# What the twin lacks: latents and how they are pooled. Its own chunks only say how far back its attention sees.
OF_THE_MODEL = ("chunking.", "autoencoder.latent_dim", "autoencoder.pooling")
MINUTES = ("training.autoencoder.minutes", "training.prior.minutes")


def load_pair(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, Config]:
    """Model and twin. What `overrides` say holds for both, but for OF_THE_MODEL.

    Where they set minutes, the twin's one stage has those of both stages. Raises ConfigError for what is no pair: a
    twin in place of the model, a missing or other twin, two that read different text.
    """
    twin_path = path.with_name(f"{path.stem}-twin{path.suffix}")
    model = load_config([path], overrides)
    if model.is_twin:
        raise ConfigError(
            f"{path} is a twin: it has no latents to vary; give the config that it is the twin of"
        )
    settings = {key: setting for override in overrides for key, setting in parse_override(override).items()}
    # as JSON, which a value in quotes or brackets is read as: just what was parsed
    shared = [
        f"{key}={json.dumps(s.value)}" for key, s in settings.items() if not key.startswith(OF_THE_MODEL)
    ]
    first, second = model.training.autoencoder.minutes, model.training.prior.minutes
    if settings.keys() & set(MINUTES) and first and second:
        shared.append(f"{MINUTES[0]}={first + second}")
    twin = load_config([twin_path], shared)
    if not twin.is_twin:
        raise ConfigError(
            f"{twin_path} has latents (autoencoder.latent_dim={twin.autoencoder.latent_dim}): no twin"
        )
    check_pair(model, path, twin, twin_path)
    return model, twin
