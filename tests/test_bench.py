"""Bench: whole figures for tiny models, operators in their groups, errors in one line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hldm import bench
from hldm.cli import main
from hldm.config import to_yaml


@pytest.fixture
def configs(small_config, small_twin, tmp_path, monkeypatch):
    """A folder with small.yaml and small-twin.yaml; what is measured is as little as can be."""
    for config in (small_config, small_twin):
        (tmp_path / f"{config.name}.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(bench, "GEMM_SIZE", 64)
    monkeypatch.setattr(bench, "PROFILED_STEPS", 1)
    monkeypatch.setattr(bench, "WRITTEN_CHARACTERS", 8)
    monkeypatch.setattr(bench, "WRITING", {"batch_1": (1, 20), "batch_8": (3, 20), "long_prompt": (1, 5000)})
    return tmp_path


def finite_numbers(found):
    """Every number in nested dicts; None and text are left out."""
    for value in found.values():
        if isinstance(value, dict):
            yield from finite_numbers(value)
        elif isinstance(value, int | float):
            assert math.isfinite(value)
            yield value


def test_both_stages_and_the_twin_are_measured_in_training_and_writing(configs, capsys):
    target = configs / "bench.json"
    assert (
        main(["bench", "--config", str(configs / "small.yaml"), "--steps", "2", "--json", str(target)]) == 0
    )
    found = json.loads(target.read_text())
    assert min(finite_numbers(found)) >= 0

    training = found["training"]
    assert list(training) == ["stage one", "stage two", "twin"]
    assert training["twin"]["ratio_to_twin"] == 1
    for figures in training.values():
        assert 0 < figures["characters_per_second"] <= figures["characters_per_second_best"]
        seconds = figures["profile"]["seconds"]
        for group in ("matrix products", "optimizer", "norm", "embedding", "elementwise", "copies"):
            assert seconds[group] > 0, group
        assert 0 < figures["profile"]["matrix_share"] < 1
        assert seconds["other"] < 0.5 * sum(seconds.values())
    for stage in ("stage one", "twin"):
        assert training[stage]["profile"]["seconds"]["recurrence"] > 0

    model, twin = found["generation"]["model"], found["generation"]["twin"]
    for case in ("batch_1", "batch_8", "long_prompt"):
        assert model[case]["denoiser_calls"] > 0 == twin[case]["denoiser_calls"]
    # both prompts go on with the same text, so that only its cost can differ
    assert model["batch_1"]["characters"] == model["long_prompt"]["characters"] >= 8

    printed = capsys.readouterr()
    assert found["machine"]["cpu"] in printed.out and f"torch {found['machine']['torch']}" in printed.out
    for words in ("over the twin's", "of the peak", "recurrence", "denoiser calls", "long prompt over short"):
        assert words in printed.out


def test_a_profile_counts_the_products_of_a_step_exactly():
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    x, weight = torch.randn(6, 4), torch.randn(4, 3)
    batch = torch.randn(2, 5, 4)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as seen:
        x @ weight  # outside of a step: not counted
        with record_function(bench.STEP):
            x @ weight
            torch.addmm(torch.zeros(3), x, weight)
            batch @ batch.mT
            torch.zeros(2, 5, 5).baddbmm_(batch, batch.mT)
            torch.randn(6, 4).exp().sum()
    found = bench.sum_by_group(seen.events())
    flops = 2 * (2 * 6 * 4 * 3) + 2 * (2 * 2 * 5 * 4 * 5)
    assert found["matrix_gflop"] == pytest.approx(flops / 1e9 / bench.PROFILED_STEPS)
    assert set(found["seconds"]) == set(bench.GROUPS)


@pytest.mark.parametrize(
    ("callers", "group"),
    [
        ("aten::linear aten::addmm", "matrix products"),
        ("autograd::engine::evaluate_function: GatedDecayFunctionBackward aten::bmm", "matrix products"),
        ("Optimizer.step#Muon.step aten::mm", "optimizer"),
        ("Optimizer.step#AdamW.step aten::mul_", "optimizer"),
        ("_ChunkedScan aten::addcmul", "recurrence"),
        ("GatedScanFunction hldm::gated_scan", "recurrence"),
        ("aten::scaled_dot_product_attention aten::_safe_softmax", "attention"),
        ("aten::log_softmax aten::_log_softmax", "elementwise"),
        ("RMSNormFunction aten::mul", "norm"),
        ("aten::embedding aten::index_select", "embedding"),
        ("aten::gelu", "elementwise"),
        ("_GeluGateFunction hldm::gelu_gate", "elementwise"),
        ("aten::contiguous aten::clone aten::copy_", "copies"),
        ("aten::transpose", "other"),
        ("MmBackward0", "other"),
        ("", "between operators"),
    ],
)
def test_an_operator_belongs_to_the_group_it_works_for(callers, group):
    assert bench.group_of([bench.STEP, *callers.split()]) == group


def test_shares_of_the_peak_are_while_products_run_and_over_the_step():
    profile = {"seconds": {"matrix products": 0.2, "other": 0.3}, "matrix_gflop": 6.0}
    found = bench.rate_products(profile, seconds_per_step=0.4, peak=60.0)
    assert found["matrix_share"] == pytest.approx(0.4)
    assert (found["peak_share_inside"], found["peak_share_whole"]) == pytest.approx((0.5, 0.25))


def test_the_decoder_writes_chunks_about_as_long_as_the_corpus_has_them():
    import numpy as np
    import torch

    outputs = torch.nn.Linear(4, 258)
    corpus = SimpleNamespace(text=np.frombuffer(b"aab" * 10, np.uint8))
    bench.write_like(SimpleNamespace(outputs=outputs), corpus, chunks=6)  # 5 bytes each, and an end
    p = outputs(torch.randn(4)).softmax(dim=-1)
    assert p[256].item() == pytest.approx(1 / 6) and p[257].item() == 0
    assert p[ord("a")].item() == pytest.approx(20 / 36)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "{}/missing.yaml"], "missing.yaml"),
        (["--config", "{}/small-twin.yaml", "--twin", "{}/small-twin.yaml"], "latent_dim"),
        (["--config", "{}/small.yaml", "--twin", "{}/small.yaml"], "latent_dim"),
        (["--config", "{}/small-twin.yaml"], "small-twin-twin.yaml"),
        (["--config", "{}/small.yaml", "--steps", "0"], "--steps must be at least 1"),
        (["--config", "{}/small.yaml", "--json", "{}/no/such/bench.json"], "no folder"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(configs, capsys, arguments, says):
    assert main(["bench", *(argument.format(configs) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_help_needs_no_torch():
    code = (
        "import sys; from hldm.cli import main\n"
        "try: main(['bench', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
