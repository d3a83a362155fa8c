"""Training on a GPU: a step of each stage, torch.compile, and several ranks."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hldm.config import Config, changed, load_config, stage_training, to_yaml
from hldm.model.griffin import Griffin
from hldm.runs.clock import timed
from hldm.runs.machine import gpu_memory, human
from hldm.studies.bench_training import memory_of, trainer_of
from hldm.studies.gpu_card import (
    CPU_SIZES,
    ROOT,
    Card,
    Skipped,
    dtype_name,
    matrix_peak,
    relative_error,
)
from hldm.training.optimizers import WARMUP
from hldm.training.sizes import stage_sizes

FREE_SHARE = 0.8  # of the memory of a card, what a training step is given
STEPS, WARM_UP_STEPS = 5, 2  # of training: the median of those that count
STEPS_S = 45.0  # or as many as fit
RANK_STEPS, RANKS_S = 4, 240.0  # of a training by one rank or two; it is ended after so long
TRACE_STEPS = 64  # of a scan that torch.compile would have to unroll


def _fitting(card: Card, stage: str) -> Config:
    """The config with as many streams (data.lanes) as `hldm sizes` says fit."""
    config, memory = card.config, gpu_memory()
    if memory is None:
        return config
    while config.data.lanes > 1 and sum(stage_sizes(config, stage).device.values()) > FREE_SHARE * memory:
        config = changed(config, data=changed(config.data, lanes=config.data.lanes // 2))
    return config


def _training(card: Card, stage: str) -> tuple[str, dict[str, Any]]:
    config = _fitting(card, stage)
    trainer = trainer_of(config, stage)

    def step() -> int:
        before = trainer.totals.characters
        if trainer.step(WARMUP) is None:
            raise AssertionError("a step was not finite")
        return trainer.totals.characters - before

    with FlopCounterMode(display=False) as counter:
        step()
    if card.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    turns, began = [], time.monotonic()
    for number in range(WARM_UP_STEPS + STEPS):
        turns.append(timed(step))
        if number >= WARM_UP_STEPS and time.monotonic() - began > STEPS_S:
            break
    measured = turns[WARM_UP_STEPS:]
    seconds = statistics.median(s for _, s in measured)
    rate = statistics.median(characters / s for characters, s in measured)
    share = counter.get_total_flops() / seconds / 1e12 / matrix_peak(card)
    said = sum(stage_sizes(config, stage).device.values())
    if card.is_gpu:
        peak: int | None = torch.cuda.max_memory_allocated()
    else:
        memory = memory_of(trainer)
        peak = None if memory is None else memory["peak_bytes"]
    trainer.accelerator.free_memory()
    found = {
        "lanes": config.data.lanes,
        "window_bytes": config.data.window_bytes,
        "characters_per_second": rate,
        "seconds_per_step": seconds,
        "share_of_peak": share,
        "peak_bytes": peak,
        "sizes_bytes": said,
        "loss_is_finite": True,
    }
    taken = "not measured" if peak is None else human(peak)
    return (
        f"{config.name}, {config.data.lanes} streams of {config.data.window_bytes} bytes, {dtype_name(card.dtype)}: "
        f"{rate:,.0f} characters/s, {seconds:.3g} s a step, products at {share:.1%} of the peak; memory {taken} where "
        f"hldm sizes says {human(said)}"
    ), found


def stage_one(card: Card) -> tuple[str, dict[str, Any]]:
    """A training step of the autoencoder."""
    return _training(card, "autoencoder")


def stage_two(card: Card) -> tuple[str, dict[str, Any]]:
    """A training step of the prior."""
    return _training(card, "prior")


def compiling(card: Card) -> tuple[str, dict[str, Any]]:
    """Forward and backward of the encoder's stack with torch.compile and without; training itself compiles nothing."""
    from hldm.kernels.scan import runs_in_triton

    config = _fitting(card, "autoencoder")
    window = config.data.window_bytes
    if not runs_in_triton(torch.zeros(1, device=card.device)):
        window = min(window, TRACE_STEPS if card.is_gpu else 4)
    torch.manual_seed(0)
    stack = Griffin(config.autoencoder.encoder, window=config.chunking.max_bytes).to(card.device).eval()
    rows = max(config.data.lanes // 4, 1)
    x = torch.randn(rows, window, stack.config.width, device=card.device, requires_grad=True)
    none = torch.zeros(x.shape[:2], dtype=torch.bool, device=card.device)
    state = stack.initial_state(rows, card.device)

    def work(module: Any) -> tuple[Tensor, Tensor]:
        with card.autocast():
            y, _ = module(x, state, none, none)
        (gradient,) = torch.autograd.grad(
            y.float().sin().sum(), [x]
        )  # of squares, which are normed, it would be 0
        return y.detach(), gradient

    # without a card only what it traces is tested, not the code it makes
    compiled = torch.compile(stack, backend="inductor" if card.is_gpu else "aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        found, first = timed(lambda: work(compiled))
    error = max(relative_error(*pair, card.dtype) for pair in zip(found, work(stack), strict=True))
    on, off = (min(timed(partial(work, module))[1] for _ in range(5)) for module in (compiled, stack))
    return (
        f"the encoder's stack, forward and backward: {off / on:.2f} x as fast ({1e3 * on:.3g} ms on, "
        f"{1e3 * off:.3g} ms off), {first:.0f} s to compile, off by {error:.1g}"
    ), {"seconds_on": on, "seconds_off": off, "seconds_to_compile": first, "error": error}


def two_ranks(card: Card) -> tuple[str, dict[str, Any]]:
    """Two ranks train what one does, at tiny size."""
    if card.is_gpu and torch.cuda.device_count() < 2:
        raise Skipped("needs two cards")
    config = load_config([ROOT / "configs/tiny.yaml"], CPU_SIZES) if card.is_gpu else card.config
    config = stage_training(config, "autoencoder", steps=RANK_STEPS, minutes=0.0, mixed_precision="no")
    config = changed(config, logging=changed(config.logging, every=1, sample_every=0))
    with TemporaryDirectory() as folder:
        (Path(folder) / "ranks.yaml").write_text(to_yaml(config), encoding="utf-8")
        train = ["hldm", "train-autoencoder", "--config", "ranks.yaml"]
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        launch += [
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            str(_free_port()),
        ]
        one = _losses(Path(folder), "one", train)
        two = _losses(Path(folder), "two", [*launch, "--module", *train])
    error = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    if not error < 1e-3:
        raise AssertionError(f"the losses of two ranks are off by {error:.2g} of one's: {two} and {one}")
    return f"{len(two)} steps of two ranks, losses off by {error:.1g} of one's", {"error": error}


def _losses(folder: Path, name: str, module: list[str]) -> list[float]:
    """Bits of every step of a training in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *sys.path]))}
    ran = subprocess.run(
        [sys.executable, "-m", *module, "--name", name],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=RANKS_S,
    )  # fmt: skip
    if ran.returncode:
        raise AssertionError(f"{module[0]} ended with {ran.returncode}: {ran.stderr.strip()[-200:]}")
    lines = (folder / "runs" / name / "autoencoder" / "metrics.jsonl").read_text().splitlines()
    return [entry["decoder"] + entry["latent"] for entry in map(json.loads, lines) if "event" not in entry]


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])
