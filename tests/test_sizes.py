"""What a config needs is known before anything is allocated, and what does not fit is refused with numbers."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from hldm import cli, sizes
from hldm.autoencoder import Autoencoder
from hldm.carry import named_tensors
from hldm.config import Config, ConfigError, load_config, stage_training, to_yaml
from hldm.objectives import AutoencoderObjective, PriorObjective
from hldm.prior import Prior
from hldm.stages import train_autoencoder
from hldm.training import make_optimizers

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TINY = ROOT / "configs/tiny.yaml"
OTHERS = [  # settings around configs/tiny.yaml that the shipped files do not show
    ["autoencoder.rate=diffusion", "autoencoder.encoder.conv_width=40", "training.autoencoder.optimizer=adamw"],
    ["prior.contextualiser=griffin", "hierarchy.levels=0", "autoencoder.rate=none", "autoencoder.latent_dim=200"],
    ["prior.heads=32", "prior.denoiser_layers=5", "autoencoder.decoder.mlp_ratio=1.37", "training.prior.joint=0.5"],
]
CASES = [(path, ()) for path in CONFIGS] + [(TINY, tuple(overrides)) for overrides in OTHERS]


def objectives(config: Config) -> dict[str, AutoencoderObjective | PriorObjective]:
    """Both stages' modules, built without memory."""
    with torch.device("meta"):
        autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking)
        prior = None
        if not config.is_twin:
            z = config.autoencoder.latent_dim
            prior = Prior.from_settings(z, config.prior, config.hierarchy, config.diffusion)
        rate = prior if config.autoencoder.rate == "diffusion" else None
        found: dict = {"autoencoder": AutoencoderObjective(autoencoder, config.autoencoder, 0.0, rate)}
        if prior is not None:
            found["prior"] = PriorObjective(prior, autoencoder, config.training.prior.joint)
    return found


@pytest.mark.parametrize(("path", "overrides"), CASES, ids=lambda case: getattr(case, "stem", None))
def test_weights_optimizers_and_states_are_counted_exactly(path, overrides):
    config = load_config([path], overrides)
    with torch.device("meta"):
        found = objectives(config)
    for stage, objective in found.items():
        weights = [w for part in sizes.stage_weights(config, stage).values() for w in part]
        assert sorted(w.shape for w in weights) == sorted(tuple(p.shape) for p in objective.parameters())
        counted = sizes.stage_sizes(config, stage).device
        optimizers = make_optimizers(objective, getattr(config.training, stage))
        moments = 0
        for optimizer, each in zip(optimizers, (2, 1), strict=False):
            moments += sum(each * p.numel() for g in optimizer.param_groups for p in g["params"])
        assert counted["optimizer state"] == 4 * moments
        assert counted["gradients"] == 4 * sum(p.numel() for p in objective.parameters() if p.requires_grad)
        carry = objective.initial_carry(3, torch.device("meta"))
        carried = sum(t.numel() * t.element_size() for _, t in named_tensors(carry))
        assert 3 * sizes.state_bytes(config, stage) == carried


def test_a_config_says_its_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    (tmp_path / "b.jsonl").write_bytes(b"x" * 500)
    data = load_config([TINY]).data
    assert sizes.text_bytes(replace(data, path=str(tmp_path))) == 1500
    assert sizes.text_bytes(replace(data, path=str(tmp_path / "*.txt"))) == 1000
    assert sizes.text_bytes(replace(data, path=str(tmp_path), max_bytes=70)) == 70
    assert sizes.text_bytes(replace(data, path="", max_bytes=10**9)) == pytest.approx(4.2e6, rel=0.05)


@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_the_size_of_a_checkpoint_is_that_of_a_real_one(stage, trained_run, small_config):
    # of a model of some thousand parameters: headers and records are at their largest share
    real = sum(f.stat().st_size for f in (trained_run / stage / "checkpoints/step-000000012").iterdir())
    estimate = sizes.stage_sizes(small_config, stage).disk["checkpoints"] / (small_config.checkpoint.keep + 1)
    print(stage, estimate, real)
    assert estimate == pytest.approx(real, rel=0.25)
