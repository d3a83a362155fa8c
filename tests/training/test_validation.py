"""Validation while a model trains: the figures of evaluate, nothing of training changed, the best weights kept."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from conftest import ROOT

from hldm.config import Config, ConfigError, changed, load_config, stage_training
from hldm.evaluation.bound import evaluate_bound, held_out_windows
from hldm.evaluation.validation import DRAWS, PIECES, slice_of, validation_on
from hldm.generation.pipeline import read_pipeline
from hldm.runs.checkpoints import newest_checkpoint
from hldm.runs.clock import in_turns
from hldm.runs.exits import Interrupted
from hldm.runs.folder import last_validation, read_totals
from hldm.sources.corpora import load_corpora
from hldm.studies import bench_training
from hldm.text.corpus import make_corpus
from hldm.training import stages
from hldm.training import validations as validations_of_training
from hldm.training.patience import Patience
from hldm.training.sizes import stage_sizes
from hldm.training.stages import train_autoencoder, train_diffusion, train_run
from hldm.training.trainer import Trainer
from hldm.training.validations import COST, FARTHEST, NEAREST, spacing

SIZE = 512


@pytest.fixture
def config(small_config: Config, monkeypatch) -> Config:
    monkeypatch.setattr(validations_of_training, "EVERY", 5)
    monkeypatch.setattr(stages, "VALIDATION_BYTES", SIZE)
    logging = changed(small_config.logging, sample_every=0)
    return changed(small_config, logging=logging)


def validations(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == "validation"]


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    saved = newest_checkpoint(folder)
    assert saved is not None
    return saved.tensors["model"]


def test_the_figures_are_those_of_evaluate_and_stage_two_starts_where_stage_one_ended(config, tmp_path):
    run = train_run(config, root=tmp_path, validation=validation_on)
    first, second = (validations(run / stage) for stage in ("autoencoder", "prior"))
    for lines in (first, second):  # every 5 steps, and after a third of the run where its time is not known
        assert {0, 4, 5, 10, 12} <= {line["step"] for line in lines}
    # stage one's mixture, as a prior of the least size, and stage two's own, which says nothing yet
    assert second[0]["validation_bound"] == pytest.approx(first[-1]["validation_bound"], abs=1e-6)
    pipeline = read_pipeline(run / "pipeline")
    text = slice_of(load_corpora(config.data)["validation"], SIZE)
    bound = evaluate_bound(
        pipeline.autoencoder,
        pipeline.prior,
        held_out_windows(pipeline.autoencoder, text),
        draws=DRAWS,
        generator=torch.Generator().manual_seed(config.seed),
    ).bits_per_character()
    for name, value in last_validation(run).items():
        assert second[-1][f"validation_{name}"] == value == pytest.approx(bound[name], abs=1e-6)


def test_a_run_killed_before_its_export_validates_its_end_once(config, tmp_path):
    """Its last checkpoint may be older than its last validation, and of the same step."""
    folder = train_autoencoder(config, root=tmp_path, validation=validation_on) / "autoencoder"
    before = validations(folder)
    (folder / "totals.json").unlink()
    train_autoencoder(config, root=tmp_path, resume=True, validation=validation_on)
    assert validations(folder) == before and before[-1]["step"] == 12


def test_the_twin_validates_its_likelihood(small_twin, config, tmp_path):
    run = train_run(changed(small_twin, logging=config.logging), root=tmp_path, validation=validation_on)
    last = last_validation(run)
    assert last["bound"] == last["decoder"] > 0 and last["latent"] == last["end"] == 0


def test_validating_changes_nothing_of_what_is_learnt(config, tmp_path):
    for stage in ("autoencoder", "prior"):
        config = stage_training(config, stage, steps=7)
    runs = [
        train_run(config, root=tmp_path / name, validation=validation)
        for name, validation in (("with", validation_on), ("without", None))
    ]
    for stage in ("autoencoder", "prior"):
        weights = [model_of(run / stage) for run in runs]
        torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert not validations(runs[1] / "prior")


def test_a_stage_stops_when_nothing_gets_better_and_keeps_the_best(config, tmp_path, capsys):
    bits = iter([5.0, 4.0, 3.0, math.nan, 3.5, 3.0, 1.0])
    seen: list[dict[str, torch.Tensor]] = []

    def told(autoencoder, corpus, size, seed) -> Callable[..., dict[str, float]]:
        def measure(autoencoder, prior) -> dict[str, float]:
            seen.append({name: tensor.clone() for name, tensor in autoencoder.state_dict().items()})
            return {"bound": next(bits), "latent": 0.0, "decoder": 0.0, "end": 0.0}

        return measure

    patient = stage_training(config, "autoencoder", steps=100, patience=3)
    folder = train_autoencoder(patient, root=tmp_path, validation=told) / "autoencoder"
    assert read_totals(folder).steps == 25 and len(seen) == 6
    out = capsys.readouterr().out
    assert "stopped after 25 steps: 3 validations without a better one" in out
    assert "kept the weights after step 10, which validated at 3.000 bits/char" in out
    from hldm.model.autoencoder import Autoencoder

    kept = Autoencoder.from_pretrained(folder / "model").state_dict()
    torch.testing.assert_close(kept, seen[2], rtol=0, atol=0)
    assert any(not torch.equal(kept[name], seen[5][name]) for name in kept)


@pytest.mark.parametrize("stage", ["autoencoder", pytest.param("prior", marks=pytest.mark.slow)])
def test_a_run_stopped_on_the_way_waits_as_long_and_keeps_the_same(stage, config, tmp_path, monkeypatch):
    """Stopped at a validation and between two; the figure is of the weights, and soon gets worse."""

    def soon_worse(*parts) -> Callable[..., dict[str, float]]:
        measure = validation_on(*parts)

        def turned(*models) -> dict[str, float]:
            found = measure(*models)
            return found | {"bound": abs(found["bound"] - turn)}

        return turned

    turn = {"autoencoder": 6.0, "prior": 5.4}[stage]
    patient = stage_training(config, stage, steps=60, patience=2)
    train = train_autoencoder if stage == "autoencoder" else train_diffusion
    if stage == "prior":
        for name in ("straight", "stopped"):
            train_autoencoder(config, root=tmp_path / name)
    straight = train(patient, root=tmp_path / "straight", validation=soon_worse) / stage
    steps = read_totals(straight).steps
    assert 10 <= steps < 60
    original = Trainer.step

    def step_then_signal(self: Trainer, progress: float) -> dict[str, float] | None:
        if self.totals.steps + 1 in (steps - 5, steps - 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, progress)

    monkeypatch.setattr(Trainer, "step", step_then_signal)
    for resume in (False, True):
        with pytest.raises(Interrupted):
            train(patient, root=tmp_path / "stopped", resume=resume, validation=soon_worse)
    monkeypatch.setattr(Trainer, "step", original)
    stopped = train(patient, root=tmp_path / "stopped", resume=True, validation=soon_worse) / stage
    assert read_totals(stopped).steps == steps
    assert validations(straight) == validations(stopped)
    saved = [newest_checkpoint(folder) for folder in (straight, stopped)]
    assert saved[0] is not None and saved[1] is not None and "best" in saved[0].tensors
    torch.testing.assert_close(saved[0].tensors, saved[1].tensors, rtol=0, atol=0)
    assert saved[0].state["patience"] == saved[1].state["patience"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_validating_takes_a_share_of_two_percent_of_the_time_at_most(stage):
    config = load_config([ROOT / "configs/tiny.yaml"])
    text = load_corpora(config.data)["validation"]
    trainer = bench_training.trainer_of(config, stage)
    make = stages._validate_autoencoder if stage == "autoencoder" else stages._validate_prior
    validate = make(config, trainer.objective.autoencoder, text, validation_on)
    assert validate is not None

    def validated() -> None:
        trainer.objective.eval()
        validate(trainer.objective)
        trainer.objective.train()

    found = in_turns({"step": lambda: trainer.step(0.1), "validation": validated}, turns=5, warm_up=1)
    step, validation = (median(seconds for _, seconds in found[name]) for name in ("step", "validation"))
    assert validation < 0.02 * validations_of_training.EVERY * step


def test_patience_without_validations_is_refused(config, tmp_path):
    patient = stage_training(config, "autoencoder", patience=1)
    free = changed(patient, autoencoder=changed(config.autoencoder, components=0))
    for wrong, validation in ((patient, None), (free, validation_on)):
        with pytest.raises(ConfigError, match="training.patience needs validations"):
            train_autoencoder(wrong, root=tmp_path, validation=validation)
    assert not list(tmp_path.iterdir())


def test_a_short_run_is_measured_on_the_way_and_says_so(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(validations_of_training, "clock_named", lambda name: lambda: 0.0)  # it takes no time
    monkeypatch.setattr(validations_of_training, "EVERY", 250)
    rare = changed(config, logging=changed(config.logging, every=250))

    def at_once(*_) -> Callable[..., dict[str, float]]:
        return lambda *models: {"bound": 3.0, "latent": 1.0, "decoder": 2.0, "end": 0.0}

    folder = train_autoencoder(rare, root=tmp_path, validation=at_once) / "autoencoder"
    steps = [line["step"] for line in validations(folder)]
    assert steps == [0, 4, 6, 8, 10, 12]  # after a third, for no step has been timed yet, then every eighth
    out = capsys.readouterr().out
    assert out.count(" validation ") == len(steps) - 1  # a line each, but for the untrained model's
    never = changed(rare, name="never", logging=changed(rare.logging, every=1))
    folder = train_autoencoder(never, root=tmp_path) / "autoencoder"
    assert not validations(folder)


def test_what_is_measured_on_the_way_costs_two_percent_and_is_there_twice_in_the_shortest_run():
    assert spacing(1.0, 300.0) == pytest.approx(1 / 6)  # five of a second each, of 300
    assert spacing(0.1, 300.0) == NEAREST and spacing(10.0, 300.0) == FARTHEST
    assert spacing(60.0, 300.0) == spacing(1.0, -3.0) == math.inf  # dearer than the run is worth
    assert spacing(1.0, None) == FARTHEST
    for cost, in_all in ((0.5, 60.0), (2.0, 600.0), (0.01, 10.0)):
        times = math.ceil(1 / spacing(cost, in_all)) - 1  # before the end
        assert times >= 2 and (times * cost <= COST * in_all or times == 2)


def test_patience_counts_what_comes_every_so_many_steps_alone(config, tmp_path, monkeypatch):
    """In between, they come by the clock: a run that is resumed would stop elsewhere."""

    def worse_and_worse(*_) -> Callable[..., dict[str, float]]:
        found = iter(range(1, 99))
        return lambda *models: {"bound": float(next(found)), "latent": 0.0, "decoder": 0.0, "end": 0.0}

    patient = stage_training(config, "autoencoder", steps=40, patience=1)
    monkeypatch.setattr(validations_of_training, "EVERY", 20)
    folder = train_autoencoder(patient, root=tmp_path, validation=worse_and_worse) / "autoencoder"
    steps = [line["step"] for line in validations(folder)]
    assert read_totals(folder).steps == 20 and set(steps) >= {0, 14, 20} and steps[-1] == 20


def test_the_best_weights_count_as_memory_and_disk(config):
    plain, patient = (
        stage_sizes(stage_training(config, "prior", patience=patience), "prior") for patience in (0, 1)
    )
    assert patient.host["best weights"] == plain.device["parameters"] and not plain.host["best weights"]
    more = patient.disk["checkpoints"] - plain.disk["checkpoints"]
    assert more == plain.device["parameters"] * (config.checkpoint.keep + 1)


def test_patience_saves_what_it_needs_and_0_keeps_nothing():
    weights = {"a": torch.arange(3.0)}
    patience, never = Patience(2), Patience(0)
    for step, bits in ((1, 2.0), (2, 1.5), (3, math.inf)):
        patience.add(step, bits, weights)
        never.add(step, bits, weights)
    assert (never.weights, never.is_spent, never.lines(3)) == ({}, False, [])
    again = Patience(2)
    again.restore(json.loads(json.dumps(patience.state)), patience.weights)
    assert (again.bits, again.step, again.waited) == (1.5, 2, 1) and not again.is_spent
    again.add(4, 1.5, weights)
    assert again.is_spent


def test_a_slice_is_of_documents_everywhere_and_of_whole_characters():
    documents = [chr(0x4E00 + index).encode() * 100 for index in range(50)]
    found = slice_of(make_corpus("x", documents), 800)
    assert len(found) == PIECES and len(found.text) == PIECES * 99  # 33 characters of 3 bytes
    starts = [found.document(index).tobytes().decode()[0] for index in range(PIECES)]
    assert starts[0] == chr(0x4E00) and starts[-1] == chr(0x4E00 + 49) and len(set(starts)) == PIECES
    lines = b"".join(b"line %03d of one long document\n" % number for number in range(300))
    found = slice_of(make_corpus("x", [lines]), 800)
    pieces = [found.document(index).tobytes() for index in range(len(found))]
    assert len(pieces) == PIECES and all(piece.startswith(b"line ") and len(piece) == 100 for piece in pieces)
    assert pieces[0].startswith(b"line 000") and pieces[-1] > b"line 250"
    assert len(slice_of(make_corpus("x", [lines[:1500]]), 800)) == 2
    short = make_corpus("x", [b"ab", b"c"])
    assert np.array_equal(slice_of(short, 800).text, short.text)
    assert len(slice_of(make_corpus("x", [b"\x80" * 99]), 10).text) in range(7, 11)  # no UTF-8 at all


def test_a_slice_of_short_documents_has_as_many_of_them_as_fill_it():
    short = make_corpus("x", [b"document %04d" % number for number in range(1000)])
    found = slice_of(short, 800)
    assert 700 <= len(found.text) <= 900 and found.document(len(found) - 1).tobytes() == b"document 0999"
