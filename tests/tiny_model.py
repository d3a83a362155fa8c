"""A model of some thousand random weights: made in milliseconds, and everything that a trained one is."""

from __future__ import annotations

from typing import Any

import torch

from hldm.config import (
    AutoencoderConfig,
    ChunkingConfig,
    DiffusionConfig,
    GenerationConfig,
    GriffinConfig,
    HierarchyConfig,
    PriorConfig,
)
from hldm.generation.pipeline import HLDMPipeline
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.runs.files import fingerprint


def tiny_pipeline(components: int = 4, **changes: Any) -> HLDMPipeline:
    """Random weights: some thousand of them. changes: of AutoencoderConfig; latent_dim=0 makes a twin"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        griffin = GriffinConfig(width=8, blocks=("recurrent", "attention"), heads=2)
        given = dict(reads_text=True, trunk_layers=0, components=components, latent_dim=2) | changes
        settings = AutoencoderConfig(encoder=griffin, decoder=griffin, **given)
        autoencoder = Autoencoder.from_settings(settings, ChunkingConfig(min_bytes=2, max_bytes=4))
        if not settings.latent_dim:
            return HLDMPipeline.assemble(autoencoder, None, GenerationConfig(steps=1))
        prior = Prior.from_settings(
            settings,
            PriorConfig(reads_text=False, width=8, layers=1, heads=2, denoiser_layers=1),
            HierarchyConfig(levels=1, ratio=2, window=2),
            DiffusionConfig(),
        )
    prior.register_to_config(autoencoder=fingerprint(autoencoder.state_dict()))
    return HLDMPipeline.assemble(autoencoder, prior, GenerationConfig(steps=1))
