"""Every shipped YAML loads and builds, and every twin is its model's size."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from hldm.config import Config, ConfigError, find_config, load_config
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


# ---- by name, from anywhere


def test_a_config_is_found_by_its_name_and_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny.yaml", "configs/tiny.yaml", "configs/tiny"):
        assert find_config(name).samefile(ROOT / "configs/tiny.yaml")
        assert load_config(name) == load_config(ROOT / "configs/tiny.yaml")
    assert load_config("small-twin").is_twin and load_config("small-twin").name == "small-twin"
    Path("tiny").mkdir()
    assert find_config("tiny").samefile(ROOT / "configs/tiny.yaml")
    Path("tiny.yaml").write_text("seed: 7")
    assert load_config("tiny.yaml").seed == 7
    assert find_config("elsewhere/tiny.yaml") == Path("elsewhere/tiny.yaml")
    family = "jepa-pairs, jepa-sentences, jepa-small, jepa-tiny"
    names = f"base, base-twin, {family}, large, large-twin, small, small-twin, tiny, tiny-twin"
    for name in ("tinny", "configs/tinny.yaml", "accelerate"):
        with pytest.raises(ConfigError, match=f"{name}: .* no such file, nor one of those of hldm: {names}"):
            load_config(name)


def test_demo_and_its_kind_take_a_name_outside_of_a_clone(tmp_path, monkeypatch):
    from hldm.studies.league import entries
    from hldm.studies.rate_curve import points

    monkeypatch.chdir(tmp_path)
    assert points(Path("tiny"), 6) and entries(Path("tiny"), 6, ["words"], [6])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("hatchling") is None, reason="needs hatchling, which builds wheels")
def test_a_wheel_holds_the_configs_and_its_commands_find_them(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    for path in (ROOT / "configs").rglob("*.yaml"):
        held = tmp_path / "installed/hldm" / path.relative_to(ROOT)
        assert held.read_bytes() == path.read_bytes()
    code = "import hldm, sys; from hldm.cli import main; print(hldm.__file__); sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    for config in ("tiny", "configs/tiny.yaml"):
        words = [sys.executable, "-c", code, "train-autoencoder", "--config", config, "--print-config"]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(str(tmp_path / "installed")) and "latent_dim: 4" in done.stdout
