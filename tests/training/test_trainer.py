"""Trained, stopped and resumed equals trained; split over ranks or micro-batches equals whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

from hldm.chunking.chunker import make_chunker
from hldm.config import Config, ConfigError, changed, load_config, stage_training
from hldm.model.autoencoder import Autoencoder
from hldm.runs.checkpoints import newest_checkpoint
from hldm.runs.exits import Interrupted
from hldm.runs.progress import describe
from hldm.sources.corpora import load_corpora
from hldm.text.windows import Batch, Windows
from hldm.training.anomalies import TrainingDiverged
from hldm.training.objectives import AutoencoderObjective
from hldm.training.optimizers import learning_rate
from hldm.training.stages import train_autoencoder, train_diffusion
from hldm.training.trainer import Trainer, step_seed


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Everything in the last checkpoint of a stage."""
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint.tensors


def assert_same(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> None:
    assert a.keys() == b.keys()
    for stem in a:
        torch.testing.assert_close(a[stem], b[stem], rtol=0, atol=0)


def losses(folder: Path, *names: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [sum(line[name] for name in names) for line in lines if "event" not in line]


def test_seeds_differ_by_run_step_and_stream():
    assert len({step_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125


def run_killed(folder: Path, config: Config, script: str, *overrides: str) -> None:
    """Run a stage in a process of its own, in `folder`, and kill -9 it after its first checkpoint."""
    settings = ["--config", str(ROOT / "configs/tiny.yaml"), "--name", config.name, *SMALL, *overrides]
    settings += [f"data.path={config.data.path}", 'data.separator="\\n\\n"']
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, str(ROOT / script), *settings], cwd=folder, env=environment)
    stage = "autoencoder" if "autoencoder" in script else "prior"
    saved = folder / "runs" / config.name / stage / "checkpoints"
    deadline = time.monotonic() + 120
    while not (saved.is_dir() and any(saved.glob("step-*"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_what_a_kill_leaves_goes_on_to_the_same_bits(stage, tmp_path, small_config, monkeypatch):
    """A copy of the run as it lies on the disk while a step is taken is what kill -9 leaves of it there."""
    train = train_autoencoder if stage == "autoencoder" else train_diffusion
    if stage == "prior":
        train_autoencoder(small_config, root=tmp_path / "straight")
    original = Trainer.step

    def step_and_copy(self: Trainer, progress: float) -> dict[str, float] | None:
        found = original(self, progress)
        if self.totals.steps == 7:  # one more than the last checkpoint's
            shutil.copytree(tmp_path / "straight", tmp_path / "killed")
        return found

    monkeypatch.setattr(Trainer, "step", step_and_copy)
    straight = train(small_config, root=tmp_path / "straight") / stage
    monkeypatch.setattr(Trainer, "step", original)
    left = newest_checkpoint(tmp_path / "killed" / small_config.name / stage)
    assert left is not None and left.step == 6
    resumed = train(small_config, resume=True, root=tmp_path / "killed") / stage
    assert_same(weights(straight), weights(resumed))
    assert losses(straight, "latent") == losses(resumed, "latent")


@pytest.mark.slow
def test_an_autoencoder_killed_and_resumed_is_bit_equal_to_an_uninterrupted_one(tmp_path, small_config):
    # an epoch of this corpus has 19 windows
    config = stage_training(small_config, "autoencoder", steps=24)
    straight = train_autoencoder(config, root=tmp_path / "straight")
    overrides = ["training.autoencoder.steps=24"]
    run_killed(tmp_path / "killed", config, "train_autoencoder.py", *overrides)
    resumed = train_autoencoder(config, resume=True, root=tmp_path / "killed" / "runs")
    assert_same(weights(straight / "autoencoder"), weights(resumed / "autoencoder"))
    names = ("decoder", "latent")
    assert losses(straight / "autoencoder", *names) == losses(resumed / "autoencoder", *names)


@pytest.mark.slow
def test_a_prior_killed_and_resumed_is_bit_equal_to_an_uninterrupted_one(tmp_path, small_config):
    config = stage_training(small_config, "prior", steps=40)
    runs = tmp_path / "runs"
    train_autoencoder(config, root=runs)
    straight = weights(train_diffusion(config, root=runs) / "prior")
    (runs / config.name / "prior").rename(runs / config.name / "straight")
    run_killed(tmp_path, config, "train_diffusion.py", "training.prior.steps=40")
    assert_same(straight, weights(train_diffusion(config, resume=True, root=runs) / "prior"))


def test_a_signal_saves_the_step_and_the_run_goes_on_from_it(tmp_path, small_config, monkeypatch):
    straight = weights(train_autoencoder(small_config, root=tmp_path / "a") / "autoencoder")
    seen = []
    original = Trainer.step

    def step_then_signal(self: Trainer, progress: float) -> dict[str, float] | None:
        seen.append(progress)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, progress)

    monkeypatch.setattr(Trainer, "step", step_then_signal)
    with pytest.raises(Interrupted):
        train_autoencoder(small_config, root=tmp_path / "b")
    saved = newest_checkpoint(tmp_path / "b" / "small" / "autoencoder")
    assert saved is not None and saved.step == 5
    resumed = train_autoencoder(small_config, resume=True, root=tmp_path / "b")
    assert_same(straight, weights(resumed / "autoencoder"))


@pytest.fixture
def samples_read(monkeypatch) -> list[tuple[int, int, list[list[int]]]]:
    """The (step, first row, chunk numbers) of every batch read from here on."""
    read = []
    original = Windows.batch

    def logged(self: Windows, step: int, first_row: int = 0, rows: int | None = None) -> Batch:
        batch = original(self, step, first_row, rows)
        read.append((step, first_row, batch.chunk_index.tolist()))
        return batch

    monkeypatch.setattr(Windows, "batch", logged)
    return read


@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_however_often_it_is_interrupted_a_run_reads_and_learns_the_same(
    stage, tmp_path, small_config, monkeypatch, samples_read
):
    # an epoch has 19 windows: two stops in the first, one at its end, one in the second
    every = changed(small_config, checkpoint=changed(small_config.checkpoint, every=100))  # signals save
    config = stage_training(every, stage, steps=24, accumulation=2)
    train = train_autoencoder if stage == "autoencoder" else train_diffusion
    if stage == "prior":
        for name in ("straight", "stopped"):
            train_autoencoder(small_config, root=tmp_path / name)
    samples_read.clear()
    straight = train(config, root=tmp_path / "straight") / stage
    expected = list(samples_read)
    assert len({step for step, _, _ in expected}) == 24
    samples_read.clear()

    stops = [4, 9, 19, 22]
    original = Trainer.step

    def step_then_signal(self: Trainer, progress: float) -> dict[str, float] | None:
        if self.totals.steps + 1 in stops:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, progress)

    monkeypatch.setattr(Trainer, "step", step_then_signal)
    for stop in stops:
        with pytest.raises(Interrupted, match=f"step-{stop:09d}"):
            train(config, resume=stop != stops[0], root=tmp_path / "stopped")
    monkeypatch.setattr(Trainer, "step", original)
    stopped = train(config, resume=True, root=tmp_path / "stopped") / stage

    assert samples_read == expected  # nothing twice, nothing left out
    assert_same(weights(straight), weights(stopped))
    for names in (("learning_rate",), ("gradient_norm",), ("latent",)):
        assert losses(straight, *names) == losses(stopped, *names)
    table = [learning_rate(config.training.of(stage), step / 24) for step in range(24)]
    assert losses(stopped, "learning_rate") == table


# --- numbers going wrong


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Trainer], None], *steps: int) -> None:
    """Call `change` before these steps, counted from 1."""
    original = Trainer.step

    def spoiled(self: Trainer, progress: float) -> dict[str, float] | None:
        if self.totals.steps + 1 in steps:
            change(self)
        return original(self, progress)

    monkeypatch.setattr(Trainer, "step", spoiled)


def scale_one_gradient(factor: float) -> Callable[[Trainer], None]:
    """Multiply the gradient of one parameter, once."""

    def change(trainer: Trainer) -> None:
        name, parameter = list(trainer.objective.named_parameters())[3]
        handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * factor)[1])

    return change


def events(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" in line]


def test_a_few_steps_that_are_not_finite_are_skipped(tmp_path, small_config, monkeypatch):
    spoil(monkeypatch, scale_one_gradient(float("inf")), 2, 5, 6, 7)
    folder = train_autoencoder(small_config, root=tmp_path) / "autoencoder"
    skipped = [event["step"] for event in events(folder) if event["event"].startswith("skipped")]
    assert skipped == [2, 5, 6, 7]
    assert len(losses(folder, "decoder")) == 8 and not (folder / "post-mortem.json").exists()
    for tensor in weights(folder)["model"].values():
        assert torch.isfinite(tensor).all()


def test_a_run_that_stays_not_finite_ends_with_a_post_mortem(tmp_path, small_config, monkeypatch):
    names = [name for name, _ in objective_of(small_config).named_parameters()]
    spoil(monkeypatch, scale_one_gradient(float("nan")), 5, 6, 7, 8)
    with pytest.raises(
        TrainingDiverged, match="4 steps in a row were not finite .* last checkpoint is .*-000000003"
    ):
        train_autoencoder(small_config, root=tmp_path)
    folder = tmp_path / "small" / "autoencoder"
    saved = newest_checkpoint(folder)
    assert saved is not None and saved.step == 3
    record = json.loads((folder / "post-mortem.json").read_text())
    assert (record["step"], record["last_checkpoint"]) == (8, str(saved.path))
    assert record["weights_not_finite"] == []
    windows = windows_of(small_config)
    for step, skipped in enumerate(record["skipped_steps"], start=5):
        assert skipped["step"] == step and skipped["gradient_norm"] == "nan"
        assert skipped["gradients_not_finite"] == [names[3]]
        assert skipped["rows"] == [list(place) for place in windows.places(step - 1)]
        assert set(skipped["nats"]) == {"decoder", "latent"} and skipped["learning_rate"] > 0
    # what is left can be gone on from, with a lower learning rate, say
    monkeypatch.undo()
    train_autoencoder(small_config, resume=True, root=tmp_path)


def objective_of(config: Config) -> AutoencoderObjective:
    autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking, config.diffusion.gamma_0)
    return AutoencoderObjective(autoencoder, config.autoencoder, config.diffusion.gamma_0)


def windows_of(config: Config) -> Windows:
    return Windows(
        load_corpora(config.data)["train"],
        make_chunker(config.chunking),
        lanes=config.data.lanes,
        window_bytes=config.data.window_bytes,
        seed=config.seed,
    )


def test_what_dies_is_said_once_and_at_the_end(tmp_path, small_config, monkeypatch, capsys):
    """And every line of the log holds the signs."""
    dead = {"prototypes": 1.0, "weights_bits": 0.0}
    alive = {"prototypes": 50.0, "weights_bits": 4.0}
    turns = iter([alive, alive, dead, dead, alive, dead])  # too young, at first, to be said anything of
    monkeypatch.setattr(AutoencoderObjective, "signs", lambda objective: next(turns, dead))
    config = changed(small_config, logging=changed(small_config.logging, every=1))
    train_autoencoder(config, root=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "all of its weight on one prototype" in line]
    assert [line.split(":")[0] for line in said] == ["step 3", "step 6", "at the end"]
    log = tmp_path / config.name / "autoencoder" / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["prototypes"] for row in rows if "prototypes" in row][:6] == [50, 50, 1, 1, 50, 1]
    assert sum(row.get("event") == "dead: prototypes" for row in rows) == 2


def test_weights_that_are_not_finite_are_never_saved(tmp_path, small_config, monkeypatch):
    def spoil_weight(trainer: Trainer) -> None:
        original = trainer.optimizers[0].step

        def step() -> None:
            original()
            with torch.no_grad():
                list(trainer.objective.parameters())[3].flatten()[0] = float("nan")

        trainer.optimizers[0].step = step

    spoil(monkeypatch, spoil_weight, 6)
    with pytest.raises(TrainingDiverged, match="weights are not finite after step 6"):
        train_autoencoder(small_config, root=tmp_path)
    folder = tmp_path / "small" / "autoencoder"
    assert newest_checkpoint(folder).step == 3
    assert len(json.loads((folder / "post-mortem.json").read_text())["weights_not_finite"]) >= 1


def test_a_gradient_a_million_times_too_large_is_clipped_and_said(
    tmp_path, small_config, monkeypatch, capsys
):
    config = stage_training(small_config, "autoencoder", steps=40)
    spoil(monkeypatch, scale_one_gradient(1e6), 30)
    folder = train_autoencoder(config, root=tmp_path) / "autoencoder"
    (event,) = [event for event in events(folder) if event["step"] == 30]
    assert event["event"] == "gradient spike" and event["gradient_norm"] > 100 * event["threshold"]
    assert "step 30: gradient norm" in capsys.readouterr().out
    nats = losses(folder, "decoder")
    assert len(nats) == 40 and nats[-1] < nats[0]


def test_micro_batches_add_up_to_the_whole_batch(tmp_path, small_config):
    whole = train_autoencoder(small_config, root=tmp_path / "whole") / "autoencoder"
    halves = (
        train_autoencoder(
            stage_training(small_config, "autoencoder", accumulation=2), root=tmp_path / "halves"
        )
        / "autoencoder"
    )
    assert losses(whole, "decoder", "latent") == pytest.approx(losses(halves, "decoder", "latent"), abs=1e-4)


def test_lanes_that_cannot_be_split_are_refused(tmp_path, small_config):
    with pytest.raises(ConfigError, match="divisible"):
        train_autoencoder(stage_training(small_config, "autoencoder", accumulation=3), root=tmp_path)


def test_a_run_is_never_overwritten_and_a_prior_never_gets_another_autoencoder(tmp_path, small_config):
    train_autoencoder(small_config, root=tmp_path)
    with pytest.raises(ValueError, match="--resume"):
        train_autoencoder(small_config, root=tmp_path)
    train_diffusion(small_config, root=tmp_path)
    (tmp_path / "small" / "autoencoder").rename(tmp_path / "small" / "old")
    train_autoencoder(changed(small_config, seed=1), root=tmp_path)
    with pytest.raises(ConfigError, match="autoencoder"):
        train_diffusion(small_config, resume=True, root=tmp_path)


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_say_no_more(tmp_path, small_overrides):
    plain = [*small_overrides, "training.autoencoder.steps=20"]
    arguments = [str(ROOT / "train_autoencoder.py"), "--config", str(ROOT / "configs/tiny.yaml"), *plain]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["--config_file", str(ROOT / "configs/accelerate/two_processes.yaml")]  # as README.md prints it
    launch = [sys.executable, "-m", "accelerate.commands.launch", *command]
    port = ["--main_process_port", str(29_500 + os.getpid() % 1000)]
    two = subprocess.run(
        [*launch, *port, *arguments, "--name", "two"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr[-3000:]
    assert "2 processes on cpu" in two.stdout and "Warning" not in two.stderr, two.stderr
    config = changed(load_config([ROOT / "configs/tiny.yaml"], plain), name="one")
    train_autoencoder(config, root=tmp_path / "runs")
    runs = [tmp_path / "runs" / name / "autoencoder" for name in ("one", "two")]
    assert losses(runs[0], "learning_rate") == losses(runs[1], "learning_rate")
    found = [losses(run, "decoder", "latent") for run in runs]
    assert len(found[0]) == 20 and found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.slow
def test_the_launch_that_silently_starts_one_process_is_refused(tmp_path, small_overrides):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    arguments = [str(ROOT / "train_autoencoder.py"), "--config", str(ROOT / "configs/tiny.yaml")]
    done = subprocess.run(
        [*launch, *arguments, *small_overrides], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and "--multi_gpu" in done.stderr


def test_a_line_of_stage_two_calls_its_share_a_share():
    speed = {"characters_per_second": 1.0, "seconds": 1.0}
    assert describe({"decoder": 1.5, "latent": 0.5, **speed}).startswith("2.000 bits/char (decoder")
    assert describe({"latent": 0.5, "end": 0.25, **speed}).startswith(
        "0.750 bits/char in latents alone (latent"
    )
