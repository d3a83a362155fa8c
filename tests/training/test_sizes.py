"""What a config needs is known before anything is allocated, and what does not fit is refused with numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, ROOT, segmenters_of

from hldm import cli
from hldm.chunking.strategies import SEGMENTERS
from hldm.config import Config, ConfigError, DataConfig, changed, load_config, to_yaml
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.model.state import named_tensors
from hldm.runs.folder import Run
from hldm.runs.machine import peak_memory
from hldm.sources.stream import SHUFFLE_BYTES
from hldm.studies import bench_training
from hldm.training import sizes
from hldm.training.objectives import AutoencoderObjective, PriorObjective
from hldm.training.optimizers import make_optimizers
from hldm.training.stages import train_autoencoder
from hldm.training.trainer import Trainer
from tests.limits import refused_under_limit

needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc of Linux")

TINY = ROOT / "configs/tiny.yaml"
OTHERS = [  # settings around configs/tiny.yaml that the shipped files do not show
    ["hierarchy.levels=0", "autoencoder.components=0", "autoencoder.latent_dim=200"],
    [
        "prior.width=128",
        "prior.heads=32",
        "prior.denoiser_layers=5",
        "autoencoder.decoder.mlp_ratio=1.37",
    ],
    ["autoencoder.reads_text=false", "prior.reads_text=false"],
    [
        "autoencoder.pooling=strided",
        "autoencoder.latent_dim=40",
        *("chunking.strategy=fixed", "chunking.min_bytes=9", "chunking.max_bytes=9"),
    ],
    ["autoencoder.trunk_layers=3", "autoencoder.trunk_width=64", "autoencoder.reads_text=false"],
]


def objective_of(config: Config, stage: str) -> AutoencoderObjective | PriorObjective:
    """A stage's modules, with memory."""
    autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking)
    if stage == "autoencoder":
        return AutoencoderObjective(autoencoder, config.autoencoder, 0.0)
    prior = Prior.from_settings(config.autoencoder, config.prior, config.hierarchy, config.diffusion)
    return PriorObjective(prior, autoencoder)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("strategy", list(SEGMENTERS))
def test_the_weights_of_a_segmenter_are_counted_exactly(strategy):
    config = load_config([TINY], [f"chunking.strategy={strategy}"])
    segmenter = SEGMENTERS[strategy].from_settings(config.chunking)
    found = sizes.survey(config)["stages"]["autoencoder"]
    assert found["parameters"]["segmenter"] == sum(p.numel() for p in segmenter.parameters())
    sizes.shapes_of.cache_clear()
    with segmenters_of(width=4096, layers=64), pytest.raises(ConfigError, match=r"are segmenter: choose"):
        sizes.require_room(config, "autoencoder")
    sizes.shapes_of.cache_clear()
    assert "segmenter" not in sizes.survey(load_config([TINY]))["stages"]["autoencoder"]["parameters"]


@pytest.mark.parametrize("overrides", [[], ["autoencoder.latent_dim=0"], *OTHERS])
def test_weights_optimizers_and_states_are_counted_exactly(overrides):
    config = load_config([TINY], overrides)
    for stage in ("autoencoder",) if config.is_twin else ("autoencoder", "prior"):
        objective = objective_of(config, stage)
        counted = sizes.stage_sizes(config, stage).device
        assert counted["parameters"] == bytes_of(objective.parameters())
        trained = [p for p in objective.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        assert counted["gradients"] == bytes_of(p.grad for p in trained if p.grad is not None)
        moments = 0
        for optimizer in make_optimizers(objective, config.training.of(stage)):
            optimizer.step()
            kept = [value for state in optimizer.state.values() for value in state.items()]
            moments += bytes_of(value for name, value in kept if name != "step")
        assert counted["optimizer state"] == moments
        carry = objective.initial_carry(config.data.lanes, torch.device("cpu"))
        assert counted["carried states"] == 2 * bytes_of(tensor for _, tensor in named_tensors(carry))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_sized_without_taking_its_memory(path):
    config = load_config([path])
    before = torch.get_rng_state()
    _, grown = peak_memory(lambda: sizes.survey(config))
    assert grown is None or grown < 100 * 2**20
    assert torch.equal(torch.get_rng_state(), before)  # so that a seed gives the weights that it gave


def test_a_config_says_its_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    (tmp_path / "b.jsonl").write_bytes(b"x" * 500)
    data = load_config([TINY]).data
    assert sizes.text_bytes(changed(data, path=str(tmp_path))) == 1500
    assert sizes.text_bytes(changed(data, path=str(tmp_path / "*.txt"))) == 1000
    assert sizes.text_bytes(changed(data, path=str(tmp_path), max_bytes=70)) == 70
    assert sizes.text_bytes(changed(data, path="", max_bytes=10**9)) == pytest.approx(4.2e6, rel=0.05)


def test_a_stream_takes_what_its_readers_shuffle_however_long_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    config = load_config([TINY], [f"data.path={tmp_path}", "data.stream=true", "data.readers=4"])
    one, two = (sizes.stage_sizes(config, "autoencoder", processes).host for processes in (1, 2))
    assert one["stream"] == 2 * two["stream"] == 3 * 4 * SHUFFLE_BYTES
    assert one["corpus"] < 2**28  # of its beginning


def trainer_of(config: Config, stage: str, folder: Path) -> Trainer:
    """A stage ready to train, in a folder of its own."""
    trainer = bench_training.trainer_of(config, stage)
    folder.mkdir()
    trainer.run = Run(folder, is_main=True, say=print)
    return trainer


@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_a_checkpoint_takes_what_was_said_and_a_share_of_a_percent_of_the_time(stage, tmp_path):
    config = load_config([TINY])
    trainer = trainer_of(config, stage, tmp_path / stage)
    trainer.step(0.1)
    began = time.perf_counter()
    trainer.step(0.1)
    step = time.perf_counter() - began
    began = time.perf_counter()
    path = Path(trainer.save(print))
    save = time.perf_counter() - began
    real = sum(file.stat().st_size for file in path.iterdir())
    said = sizes.stage_sizes(config, stage).disk["checkpoints"] / (config.checkpoint.keep + 1)
    assert said == pytest.approx(real, rel=0.05)
    assert save < 0.02 * config.checkpoint.every * step


MEASURE = """
import sys
from tests.training.test_sizes import trainer_of
from pathlib import Path
from hldm.runs import machine
from hldm.training import sizes
from hldm.config import load_config

path, stage, folder = sys.argv[1:]
config = load_config([path])
trainer = trainer_of(config, stage, Path(folder) / stage)
trainer.step(0.1)
peak, growth = machine.peak_memory(lambda: trainer.step(0.1))
said = sizes.stage_sizes(config, stage)
print((said.device["gradients"] + said.device["activations"]) / growth, end=" ")
print((sum(said.device.values()) + sum(said.host.values())) / peak)
"""


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("tiny", "autoencoder"),
        ("tiny", "prior"),
        ("tiny-twin", "autoencoder"),
        ("small", "autoencoder"),
        ("small", "prior"),
    ],
)
def test_the_peak_of_a_step_is_estimated_within_a_factor_of_one_and_a_half(name, stage, tmp_path):
    path = ROOT / f"configs/{name}.yaml"
    command = [sys.executable, "-c", MEASURE, str(path), stage, str(tmp_path)]
    places = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, env=places, capture_output=True, text=True, check=True)
    of_step, of_process = map(float, done.stdout.split()[-2:])
    print(name, stage, of_step, of_process)
    assert 0.7 < of_step < 1.5 and 0.7 < of_process < 1.5


# ---- refusals


TOO_LARGE = {  # what is asked for -> what is said
    f"train-autoencoder --config {TINY} data.lanes=1000000000": "TiB of memory, ",
    f"train-autoencoder --config {TINY} autoencoder.trunk_layers=512": "training.autoencoder needs about",
    f"train-autoencoder --config {TINY} data.window_bytes=1000000000000": (
        "lower data.lanes, data.window_bytes or the widths"
    ),
    f"train-autoencoder --config {TINY} autoencoder.encoder.width=65536": "lower the widths",
    f"train-autoencoder --config {TINY} checkpoint.keep=1000000000000": "lower checkpoint.keep",
    "demo --config big.yaml": "training.prior needs about",  # before its first stage
}


def test_what_cannot_fit_is_refused_within_ten_seconds_of_its_start(tmp_path):
    (tmp_path / "big.yaml").write_text(f"base: {TINY}\nprior: {{width: 65536, layers: 100}}\n")
    (tmp_path / "big-twin.yaml").write_text(f"base: {ROOT / 'configs/tiny-twin.yaml'}\n")
    before = sorted(tmp_path.iterdir())
    ends = refused_under_limit(*TOO_LARGE, cwd=tmp_path)
    for end, (asked, says) in zip(ends, TOO_LARGE.items(), strict=True):
        assert end.code == 2 and says in end.line and end.seconds < 10, (asked, end)
    assert sorted(tmp_path.iterdir()) == before


def test_a_stage_is_refused_for_memory_disk_and_corpus_alike(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "available_memory", lambda: (200 * 2**20, "in this cgroup"))
    with pytest.raises(
        ConfigError, match=r"MiB of memory, 200 MiB available in this cgroup; .* python and torch"
    ):
        train_autoencoder(small_config, root=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(sizes, "free_disk", lambda folder: (10_000, folder))
    with pytest.raises(ConfigError, match=r"of disk, 9.77 KiB available .* lower checkpoint.keep"):
        train_autoencoder(small_config, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_run_has_saved_counts_as_room_when_it_goes_on(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "free_disk", lambda folder: (0, folder))
    (tmp_path / "small/autoencoder/checkpoints").mkdir(parents=True)
    with open(tmp_path / "small/autoencoder/checkpoints/a", "wb") as file:
        file.truncate(10**9)
    sizes.require_room(small_config, "autoencoder", tmp_path)


def test_processes_on_one_machine_share_its_memory(small_config, monkeypatch):
    def total() -> int:
        return next(need.total for need in sizes.needs(small_config, "autoencoder") if need.what == "memory")

    one = total()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert 1.9 * one < total() < 2.1 * one


def test_the_command_prints_a_table_and_a_verdict(small_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(to_yaml(small_config))
    assert cli.main(["sizes", "--config", "small.yaml"]) == 0
    out = capsys.readouterr().out
    assert "optimizer state" in out and out.endswith("small fits here\n")
    assert cli.main(["sizes", "--config", "small.yaml", "data.lanes=1000000000", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and "lower data.lanes" in found["stages"]["autoencoder"]["needs"][0]["refusal"]


def test_text_that_is_not_there_is_told_in_one_line_and_loops_of_links_end(tmp_path):
    with pytest.raises(ConfigError, match="~nobody-has-this-name"):
        sizes.text_bytes(DataConfig(path="~nobody-has-this-name/x.txt"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        sizes.text_bytes(DataConfig(path=str(tmp_path / "nowhere")))
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    (tmp_path / ".hidden.txt").write_bytes(b"x" * 100)
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(tmp_path)  # 2^40 paths
    assert sizes.text_bytes(DataConfig(path=str(tmp_path))) == 100
