"""Bench: whole figures for tiny models, operators in their groups, errors in one line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from hldm.cli import main
from hldm.config import changed, to_yaml
from hldm.studies import bench_training, bench_writing
from hldm.studies.bench_writing import Case


@pytest.fixture
def configs(small_config, small_twin, tmp_path, monkeypatch):
    """A folder with small.yaml and small-twin.yaml; what is measured is as little as can be."""
    for config in (small_config, small_twin):
        (tmp_path / f"{config.name}.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(bench_training, "GEMM_SIZE", 64)
    monkeypatch.setattr(bench_training, "PROFILED_STEPS", 1)
    monkeypatch.setattr(bench_writing, "TURNS", 2)
    monkeypatch.setattr(bench_writing, "CHARACTERS_A_TURN", 4)
    monkeypatch.setattr(bench_writing, "CHARACTERS_AT_LEAST", 4)
    monkeypatch.setattr(bench_writing, "CASES", {"one": Case(1, 20), "three": Case(3, 20)})
    monkeypatch.setattr(bench_writing, "LONG_CASES", {"long": Case(1, 5000)})
    monkeypatch.setattr(bench_writing, "STEPS", (0, 1))
    monkeypatch.setattr(bench_writing, "GPT2_POSITIONS", 16)
    return tmp_path


@pytest.mark.parametrize("strategy", ["entropy", "reinforce"])
def test_a_strategy_that_asks_a_model_gets_one_whose_chunks_are_as_long_as_wanted(
    small_config, strategy, small_segmenters
):
    chunking = changed(small_config.chunking, strategy=strategy, min_bytes=2)
    windows, found = bench_training.text_of(small_config.data, chunking, 0)
    assert found is not None and found.chunking.strategy == strategy
    assert len(windows.corpus.text) / windows.chunks == pytest.approx(chunking.target_bytes, rel=0.2)
    assert bench_training.text_of(small_config.data, small_config.chunking, 0)[1] is None


def finite_numbers(found):
    """Every number in nested dicts; None and text are left out."""
    for value in found.values():
        if isinstance(value, dict):
            yield from finite_numbers(value)
        elif isinstance(value, int | float):
            assert math.isfinite(value)
            yield value


@pytest.mark.slow
def test_both_stages_and_the_twin_are_measured_in_training_and_writing(configs, capsys):
    target = configs / "bench.json"
    assert (
        main(
            [
                "bench",
                "--config",
                str(configs / "small.yaml"),
                "--steps",
                "2",
                "--long",
                "--json",
                str(target),
            ]
        )
        == 0
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
        if Path("/proc/self/clear_refs").exists():
            assert figures["memory"]["peak_bytes"] > figures["memory"]["held_bytes"] > 0
        assert seconds["other"] < 0.5 * sum(seconds.values())
    for stage in ("stage one", "twin"):
        assert training[stage]["profile"]["seconds"]["recurrence"] > 0

    generation = found["generation"]
    assert list(generation) == ["model", "twin", "GPT-2"]
    model, twin, gpt2 = generation.values()
    for case in ("one", "three", "long"):
        assert (
            model[case]["denoiser_calls"] > 0 == twin[case]["denoiser_calls"] == gpt2[case]["denoiser_calls"]
        )
        assert model[case]["over_twin"] > 0 and model[case]["over_GPT-2"] > 0
        if Path("/proc/self/clear_refs").exists():
            assert all(who[case]["peak_bytes"] > who[case]["growth_bytes"] for who in generation.values())
    # both prompts go on with the same text, so that only its cost can differ
    assert model["one"]["characters"] == model["long"]["characters"] >= 8
    assert model["long"]["over_short_prompt"] > 0 and "over_short_prompt" not in model["one"]
    steps = {f"1 with {n} denoising steps" for n in (0, 1)}
    assert set(model) - set(twin) == steps and set(twin) == set(gpt2)
    assert model["1 with 1 denoising steps"]["over_twin"] > 0

    printed = capsys.readouterr()
    assert found["machine"]["cpu"] in printed.out and f"torch {found['machine']['torch']}" in printed.out
    for words in (
        "over the twin's",
        "of the peak",
        "peak memory",
        "recurrence",
        "denoiser calls",
        "after the short prompt",
    ):
        assert words in printed.out


@pytest.mark.parametrize("half", [pytest.param("training", marks=pytest.mark.slow), "writing"])
def test_half_of_it_can_be_measured_alone(configs, half, monkeypatch):
    monkeypatch.setattr(bench_writing, "CASES", {"one": Case(1, 20)})
    target = configs / "bench.json"
    arguments = ["--config", str(configs / "small.yaml"), "--steps", "1", "--json", str(target)]
    assert main(["bench", *arguments, "--only", half]) == 0
    found = json.loads(target.read_text())
    assert ("training" in found, "generation" in found) == (half == "training", half == "writing")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured on Linux alone")
def test_training_holds_three_numbers_a_weight_and_a_step_adds_a_gradient_each(small_config):
    trainer = bench_training.trainer_of(small_config, "autoencoder")
    trainer.step(0.1)
    memory = bench_training.memory_of(trainer)
    weights = sum(p.nbytes for p in trainer.objective.parameters())
    # weights, their average, one or two of each in the optimizers; states and buffers are small
    assert 3 * weights < memory["held_bytes"] < 5 * weights
    assert memory["step_bytes"] > weights
    assert memory["peak_bytes"] == memory["held_bytes"] + memory["step_bytes"]


def test_the_gpt2_has_as_many_parameters_as_it_is_compared_with():
    for wanted in (300_000, 1_700_000, 124_000_000):
        width, layers = bench_writing.gpt2_shape(wanted)
        found = 12 * layers * width**2 + (258 + bench_writing.GPT2_POSITIONS) * width
        assert found == pytest.approx(wanted, rel=0.03) and width % layers == 0


def test_the_gpt2_with_its_cache_writes_what_it_writes_without(monkeypatch):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setattr(bench_writing, "GPT2_POSITIONS", 16)
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=258, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(shape).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight)  # else it writes one letter for ever
    prompts = [b"And the king", b"In the beginn"[:12]]
    with torch.no_grad():
        writer = bench_writing.GPT2Writer(model, prompts)
        pieces = [writer.write() for _ in range(4)]
        for row, prompt in enumerate(prompts):
            known, text = list(prompt[-8:]), []
            while len(text) < 32:
                text.append(int(model(torch.tensor([known])).logits[0, -1, :128].argmax()))
                known = [*known, text[-1]]
                known = known if len(known) <= 16 else known[-8:]
            assert b"".join(piece[row].text for piece in pieces) == bytes(text)


def test_a_profile_counts_the_products_of_a_step_exactly():
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    x, weight = torch.randn(6, 4), torch.randn(4, 3)
    batch = torch.randn(2, 5, 4)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as seen:
        x @ weight  # outside of a step: not counted
        with record_function(bench_training.STEP):
            x @ weight
            torch.addmm(torch.zeros(3), x, weight)
            batch @ batch.mT
            torch.zeros(2, 5, 5).baddbmm_(batch, batch.mT)
            torch.randn(6, 4).exp().sum()
    found = bench_training.sum_by_group(seen.events())
    flops = 2 * (2 * 6 * 4 * 3) + 2 * (2 * 2 * 5 * 4 * 5)
    assert found["matrix_gflop"] == pytest.approx(flops / 1e9 / bench_training.PROFILED_STEPS)
    assert set(found["seconds"]) == set(bench_training.GROUPS)


@pytest.mark.parametrize(
    ("callers", "group"),
    [
        ("aten::linear aten::addmm", "matrix products"),
        ("autograd::engine::evaluate_function: GatedScanFunctionBackward aten::bmm", "matrix products"),
        ("Optimizer.step#Muon.step aten::mm", "optimizer"),
        ("Optimizer.step#AdamW.step aten::mul_", "optimizer"),
        ("_ChunkedScan aten::addcmul", "recurrence"),
        ("_OnePassScan hldm::scan", "recurrence"),
        ("GatedScanFunction hldm::gated_scan", "recurrence"),
        ("aten::scaled_dot_product_attention aten::_safe_softmax", "attention"),
        ("aten::log_softmax aten::_log_softmax", "elementwise"),
        ("aten::layer_norm aten::native_layer_norm", "norm"),
        ("aten::embedding aten::index_select", "embedding"),
        ("aten::gelu", "elementwise"),
        ("autograd::engine::evaluate_function: GeluGateFunctionBackward", "elementwise"),
        ("GeluGateFunction", "elementwise"),
        ("aten::contiguous aten::clone aten::copy_", "copies"),
        ("RMSNormFunction", "norm"),
        ("aten::transpose", "other"),
        ("MmBackward0", "other"),
        ("", "between operators"),
    ],
)
def test_an_operator_belongs_to_the_group_it_works_for(callers, group):
    assert bench_training.group_of([bench_training.STEP, *callers.split()]) == group


def test_every_form_of_the_scan_is_profiled_as_recurrence():
    """By the names of its classes, whatever they are called."""
    import torch

    from hldm.kernels import scan

    function = torch.autograd.Function
    forms = [
        kind.__name__ for kind in vars(scan).values() if isinstance(kind, type) and issubclass(kind, function)
    ]
    assert forms
    for form in forms:
        for names in ([form], [f"autograd::engine::evaluate_function: {form}Backward", f"{form}Backward"]):
            assert bench_training.group_of([bench_training.STEP, *names, "aten::mul"]) == "recurrence"


def test_shares_of_the_peak_are_while_products_run_and_over_the_step():
    profile = {"seconds": {"matrix products": 0.2, "other": 0.3}, "matrix_gflop": 6.0}
    found = bench_training.rate_products(profile, seconds_per_step=0.4, peak=60.0)
    assert found["matrix_share"] == pytest.approx(0.4)
    assert (found["peak_share_inside"], found["peak_share_whole"]) == pytest.approx((0.5, 0.25))


def test_the_decoder_writes_chunks_about_as_long_as_the_corpus_has_them():
    import numpy as np
    import torch

    outputs = torch.nn.Linear(4, 258)
    corpus = SimpleNamespace(text=np.frombuffer(b"aab" * 10, np.uint8))
    model = SimpleNamespace(outputs=outputs, decoder=None)
    bench_writing.write_like(model, corpus, chunks=6)  # 5 bytes each, and an end
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
        (["--config", "{}/small.yaml", "--steps", "0"], "'--steps'"),
        (["--config", "{}/small.yaml", "--json", "{}/no/such/bench.json"], "no folder"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(configs, capsys, arguments, says):
    assert main(["bench", *(argument.format(configs) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_several_processes_do_not_write_together(configs, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "--config", str(configs / "small.yaml")]) == 2
    assert "--only training" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_together_and_one_of_them_says_how_fast(small_config, small_twin, tmp_path):
    for config in (small_config, small_twin):
        (tmp_path / f"{config.name}.yaml").write_text(to_yaml(config))
    launch = [
        "--config_file",
        str(ROOT / "configs/accelerate/two_processes.yaml"),
        "--main_process_port",
        "0",
    ]
    bench = ["bench", "--config", "small.yaml", "--only", "training", "--steps", "2", "--json", "bench.json"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "hldm", *bench],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("over the twin's") == 1
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (found["machine"]["processes"], found["machine"]["threads"]) == (2, 1)
    assert found["training"]["stage one"]["characters_per_second"] > 0
