"""Every shipped YAML loads and builds, and every twin is its model's size."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT

from hldm.config import Config, load_config
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior

CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if not p.stem.startswith("jepa-"))


def parameters(config: Config) -> int:
    """Of all parts, built without memory."""
    with torch.device("meta"):
        parts: list[torch.nn.Module] = [Autoencoder.from_settings(config.autoencoder, config.chunking)]
        if not config.is_twin:
            parts.append(
                Prior.from_settings(config.autoencoder, config.prior, config.hierarchy, config.diffusion)
            )
    return sum(p.numel() for part in parts for p in part.parameters())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_builds(path):
    assert parameters(load_config([path])) > 0


@pytest.mark.parametrize("path", [p for p in CONFIGS if "twin" not in p.stem], ids=lambda path: path.stem)
def test_a_twin_has_its_models_size_text_and_time(path):
    model, twin = load_config([path]), load_config([path.with_name(f"{path.stem}-twin.yaml")])
    assert twin.is_twin and not model.is_twin
    assert parameters(twin) == pytest.approx(parameters(model), rel=0.05)
    assert twin.data == model.data
    stages = (model.training.autoencoder, model.training.prior)
    assert twin.training.autoencoder.minutes == pytest.approx(sum(stage.minutes for stage in stages))
    if not twin.training.autoencoder.minutes:
        assert twin.training.autoencoder.steps == sum(stage.steps for stage in stages)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_reads_every_file_of_configs_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    launch = load_config_from_file(str(path))
    assert launch.distributed_type == "MULTI_GPU"  # replicas: what the trainer can do
    assert launch.num_processes == {"two_processes": 2, "8_gpus": 8, "8_nodes": 64}[path.stem]
    assert launch.num_machines == (8 if path.stem == "8_nodes" else 1)
    # the lanes of the largest config can be shared out evenly
    lanes = load_config([ROOT / "configs/large.yaml"]).data.lanes
    assert lanes % launch.num_processes == 0
