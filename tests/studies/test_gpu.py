"""`hldm doctor --gpu` in its CPU form: every section runs, what is wrong is a fault, what needs a card is skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from hldm import doctor
from hldm.config import ConfigError, changed, stage_training
from hldm.kernels import scan
from hldm.studies import gpu, gpu_card, gpu_scan, gpu_training

needs_no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form")


@pytest.fixture
def fresh_accelerate():
    """accelerate's states are of the process, and this one trains in bfloat16."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def card(small_config, monkeypatch):
    """Thousands of parameters, and one step of training that counts."""
    monkeypatch.setattr(gpu_training, "STEPS", 1)
    monkeypatch.setattr(gpu_training, "WARM_UP_STEPS", 0)
    config = small_config
    for stage in ("autoencoder", "prior"):
        config = stage_training(config, stage, mixed_precision="bf16")
    return gpu_card.Card(torch.device("cpu"), config)


@pytest.mark.slow
@needs_no_card
def test_every_section_but_the_ranks_runs_on_a_cpu(card, fresh_accelerate, monkeypatch):
    monkeypatch.setattr(gpu, "SECTIONS", gpu.SECTIONS[:-1])
    results = {result.name: result for result in gpu.check(card)}
    assert {name: result.status for name, result in results.items()} == {
        **dict.fromkeys(("card", "scan", "gradients", "stage one", "stage two"), "ok"),
        **dict.fromkeys(("compiling", "writing", "generators"), "ok"),
        "kernel choice": "skipped",
    }, results
    assert results["kernel choice"].text == "kernel choice: skipped: Triton needs CUDA"
    assert results["card"].text.startswith("card: no GPU: this is the CPU form")
    found = gpu.report(list(results.values()))
    for stage in ("stage one", "stage two"):
        assert found[stage]["characters_per_second"] > 0 and found[stage]["share_of_peak"] > 0
        assert found[stage]["sizes_bytes"] > 0 and "bfloat16" in found[stage]["text"]
    assert found["writing"]["characters_per_second_64"] > 0 < found["writing"]["characters_per_second_1"]
    assert found["generators"]["rows_as_alone"] == 2
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("section", [gpu_scan.scan, gpu_scan.gradients])
def test_a_scan_that_errs_is_a_fault_and_the_next_section_runs(card, monkeypatch, section):
    right = scan.ChunkedScan.apply

    def errs(a, b, h0):
        h, last = right(a * 0.999, b, h0)
        return h, last

    monkeypatch.setattr(gpu_scan, "_scan_of", lambda card: ("Triton", errs))
    monkeypatch.setattr(gpu, "SECTIONS", (section, gpu_scan.kernel_choice))
    first, second = gpu.check(card)
    assert first.status == "FAULT" and "off by" in first.text and "\n" not in first.text
    assert second.status == "skipped"


def test_a_nan_is_too_far_off():
    with pytest.raises(AssertionError, match="off by nan"):
        gpu_card.relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2), torch.float32)


def test_a_late_section_is_skipped(card, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT_S", -1.0)
    assert {result.status for result in gpu.check(card)} == {"skipped"}


def test_lanes_are_as_many_as_the_sizes_say_fit(card, monkeypatch):
    from hldm.training.sizes import stage_sizes

    assert gpu_training._fitting(card, "autoencoder").data.lanes == 4
    half = changed(card.config, data=changed(card.config.data, lanes=2))
    enough = sum(stage_sizes(half, "autoencoder").device.values()) / gpu_training.FREE_SHARE
    monkeypatch.setattr(gpu_training, "gpu_memory", lambda: int(enough) + 1)
    assert gpu_training._fitting(card, "autoencoder").data.lanes == 2


@needs_no_card
def test_a_config_is_for_the_gpu_alone_and_must_have_latents(tmp_path):
    with pytest.raises(ConfigError, match="give both"):
        doctor.doctor(config=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such config"):
        doctor.doctor(gpu=True, config=tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a twin"):
        doctor.doctor(gpu=True, config=gpu_card.ROOT / "configs/tiny-twin.yaml")


@pytest.mark.slow
@needs_no_card
def test_the_whole_is_one_command_two_ranks_included():
    ran = subprocess.run(
            [sys.executable, "-m", "hldm", "doctor", "--gpu", "--json"],
            cwd=gpu_card.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads(ran.stdout)
    assert told["faults"] == 0 and len(told["findings"]) == len(gpu.SECTIONS)
    assert told["gpu"]["two ranks"]["error"] < 1e-3
