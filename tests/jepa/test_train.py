"""Runs of the family: resumed to the bit, split over ranks, refused in one line, as the two stages are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from jepa_small import SMALL, small

from hldm import cli
from hldm.config import changed
from hldm.jepa import train as training
from hldm.jepa.config import JepaConfig, load_jepa_config
from hldm.jepa.objective import JepaObjective
from hldm.runs.checkpoints import newest_checkpoint
from hldm.runs.exits import Interrupted
from hldm.training.trainer import Trainer


@pytest.fixture
def small_arguments(corpus_path: Path) -> list[str]:
    """Arguments of `hldm jepa train` for a second of training."""
    settings = [*SMALL, f"data.path={corpus_path}", 'data.separator="\\n\\n"']
    return ["--config", str(ROOT / "configs/jepa-tiny.yaml"), *settings]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config_of(arguments: list[str], *overrides: str) -> JepaConfig:
    return changed(load_jepa_config([arguments[1]], [*arguments[2:], *overrides]), name="run")


def last_tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    saved = newest_checkpoint(folder)
    assert saved is not None
    return saved.tensors


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def test_the_command_trains_an_encoder_then_a_decoder_and_refuses_to_do_so_twice(
    small_arguments, refused, capsys
):
    arguments = [*small_arguments, "--name", "one", "objective.option=latents"]
    assert cli.jepa(["train", *arguments]) == 0
    out = capsys.readouterr().out
    assert "rank" in out and "R2" in out and "bits/char" not in out
    assert cli.main(["jepa", "decoder", *arguments]) == 0
    assert "bits/char" in capsys.readouterr().out
    run = Path("runs/one")
    assert {path.name for path in (run / "jepa").iterdir()} > {"model", "target", "predictor", "totals.json"}
    assert not (run / "jepa" / "decoder").exists() and (run / "decoder" / "model").is_dir()
    assert "[" in (run / "decoder" / "samples.txt").read_text()
    encoder, config, _ = training.read_encoder(run)
    assert encoder.vector == config.vector == 16
    assert "pass --resume or choose another --name" in refused(cli.jepa(["train", *arguments]))
    assert "vector" in refused(cli.jepa(["decoder", *arguments, "vector=8", "--resume"]))
    assert "hldm jepa train" in refused(cli.jepa(["decoder", *small_arguments, "--name", "none"]))


@pytest.mark.parametrize("option", ["encoder_decoder", pytest.param("latents", marks=pytest.mark.slow)])
def test_a_run_stopped_by_a_signal_and_resumed_is_bit_equal_to_an_uninterrupted_one(
    option, small_arguments, tmp_path, monkeypatch
):
    config = config_of(small_arguments, f"objective.option={option}", "objective.reset_targets=false")
    straight = training.train_jepa(config, root=tmp_path / "straight") / "jepa"
    taken, original = [], Trainer.step

    def step_then_signal(self, progress):
        taken.append(progress)
        if len(taken) == 5:
            os.kill(os.getpid(), 15)
        return original(self, progress)

    monkeypatch.setattr(Trainer, "step", step_then_signal)
    with pytest.raises(Interrupted):
        training.train_jepa(config, root=tmp_path / "halted")
    assert any(name.startswith("target.") for name in last_tensors(tmp_path / "halted/run/jepa")["model"])
    halted = training.train_jepa(config, resume=True, root=tmp_path / "halted") / "jepa"
    torch.testing.assert_close(last_tensors(halted), last_tensors(straight), rtol=0, atol=0)
    for name in ("rank", "r2_beyond_length", "distance"):
        assert [line[name] for line in metrics(halted)] == [line[name] for line in metrics(straight)]


def test_the_exported_target_is_the_moving_average_and_not_its_first_weights(small_arguments, tmp_path):
    config = config_of(small_arguments, "objective.momentum=0.5", "objective.option=latents")
    folder = training.train_jepa(config, root=tmp_path) / "jepa"
    last = last_tensors(folder)["model"]
    target = training.read_encoder(folder.parent, "target")[0].state_dict()
    torch.testing.assert_close(
        dict(target), {name[7:]: value for name, value in last.items() if name.startswith("target.")},
        rtol=0, atol=0,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    assert (target["read.weight"] - last["encoder.read.weight"]).abs().max() < 0.2
    assert (target["read.weight"] - last["encoder.read.weight"]).abs().max() > 0


def test_weight_decay_grows_where_weights_multiply_and_nowhere_else(small_arguments, tmp_path, monkeypatch):
    seen, original = [], Trainer.step

    def step_and_look(self, progress):
        found = original(self, progress)
        seen.append([group["weight_decay"] for group in self.optimizers[0].param_groups])
        return found

    monkeypatch.setattr(Trainer, "step", step_and_look)
    growing = ["objective.weight_decay_growth=10", "training.weight_decay=0.04", "training.jepa.steps=3"]
    training.train_jepa(config_of(small_arguments, *growing), root=tmp_path)
    decayed, kept = zip(*seen, strict=True)
    assert (
        decayed[0] == pytest.approx(0.04) and decayed[0] < decayed[1] < decayed[2] < 0.4 and set(kept) == {0}
    )


def test_a_rank_that_is_lost_is_said_while_it_trains(small_arguments, monkeypatch, capsys):
    original = JepaObjective.watch

    def watch_with_a_rank_that_is_out_of_reach(objective, held_out):
        original(objective, held_out)
        objective.untrained_rank.fill_(100)

    monkeypatch.setattr(JepaObjective, "watch", watch_with_a_rank_that_is_out_of_reach)
    assert cli.jepa(["train", *small_arguments, "--name", "down", "--steps", "4", "logging.every=1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "collapse: effective rank" in line]
    assert [line.split(":")[0] for line in lines] == ["step 2", "at the end"]  # once, and at the end


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["objective.optoin=latents"], "the nearest known is 'objective.option'"),
        (["views.share=0.9"], "views.share"),
        (["autoencoder.latent_dim=4"], "unknown key 'autoencoder.latent_dim'"),
        (["--minutes", "0"], "must be positive"),
        (["data.path=nowhere.txt"], "nowhere.txt"),
        (["data.lanes=3", "training.accumulation=2"], "divisible"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(arguments, says, small_arguments, refused):
    assert says in refused(cli.jepa(["train", *small_arguments, *arguments]))


def test_a_segmenter_cuts_the_text_of_the_family_too(small_arguments, small_segmenters):
    asks = ["chunking.strategy=state_change", "chunking.min_bytes=2", "--steps", "2"]
    assert cli.jepa(["train", *small_arguments, "--name", "asks", *asks]) == 0
    encoder, _, chunker = training.read_encoder(Path("runs/asks"))
    assert encoder.config["segmenter"] and chunker.chunk_start(b"And the king said")[0]


def test_stage_one_starts_from_a_pretrained_encoder(
    small_arguments, tmp_path, small_overrides, refused, monkeypatch
):
    shape = ["encoder.width=16", "encoder.blocks=[recurrent,attention]"]
    training.train_jepa(config_of(small_arguments, *shape, "training.jepa.steps=2"), root=Path("runs"))
    seen = {}
    original = Trainer.step

    def step_and_look(self, progress):
        seen.setdefault("read", self.objective.autoencoder.read.weight.detach().clone())
        return original(self, progress)

    monkeypatch.setattr(Trainer, "step", step_and_look)
    stage_one = [
        "stage-one",
        "--config",
        str(ROOT / "configs/tiny.yaml"),
        "--name",
        "after",
        *small_overrides,
    ]
    few = ["training.autoencoder.steps=1"]
    assert cli.jepa([*stage_one, *few, "--jepa", "runs/run"]) == 0
    encoder = training.read_encoder(Path("runs/run"))[0]
    torch.testing.assert_close(seen["read"], encoder.read.weight.detach(), rtol=0, atol=0)
    other = [*stage_one, *few, "autoencoder.encoder.width=32", "--jepa", "runs/run"]
    assert "another encoder or chunking" in refused(cli.jepa(other))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["encoder_decoder", "predicted"])
def test_two_processes_train_what_one_does(option, small_arguments, tmp_path):
    switches = [f"objective.option={option}", "objective.variance=1", "objective.covariance=0.04"]
    arguments = ["train", *small_arguments, *switches, "objective.sigreg=0.02", "logging.every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    port = ["--main_process_port", str(29_500 + os.getpid() % 1000), "-m", "hldm.jepa"]
    for name, start in (("two", [*launch, *port]), ("one", ["-m", "hldm.jepa"])):
        command = [sys.executable, *start, *arguments, "--name", name]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (metrics(tmp_path / "runs" / name / "jepa") for name in ("one", "two"))
    assert len(one) == 12
    for name in ("gradient_norm", "distance", "rank"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], rel=1e-3, abs=1e-4)


def test_every_config_of_the_family_loads():
    for path in sorted((ROOT / "configs").glob("jepa-*.yaml")):
        config = load_jepa_config([path])
        assert config.name == path.stem and config.training.jepa.minutes > 0
    assert small().vector == 16
