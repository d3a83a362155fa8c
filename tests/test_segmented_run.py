"""A run whose chunks a segmenter cuts: made before stage one, kept with the run, asked by everything after."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hldm.config import Config, SegmenterConfig, stage_training
from hldm.evaluation import evaluate_run
from hldm.pipeline import read_pipeline
from hldm.runs import export_run
from hldm.segmenting import read_segmenter
from hldm.stages import train_autoencoder, train_diffusion, train_run


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> dict[str, Path]:
    """The run that the tests share, once there is one."""
    return {"root": tmp_path_factory.mktemp("segmented")}


@pytest.fixture
def config(small_config: Config) -> Config:
    segmenter = SegmenterConfig(width=16, layers=1, lanes=2, window_bytes=64, steps=5, minutes=0)
    chunking = replace(small_config.chunking, strategy="state_change", min_bytes=2, segmenter=segmenter)
    return replace(small_config, chunking=chunking, data=replace(small_config.data, cache_latents=True))


@pytest.fixture
def run(kept, config) -> Path:
    if "run" not in kept:
        train_run(config, root=kept["root"])
        kept["run"] = kept["root"] / config.name
    return kept["run"]


def test_both_stages_evaluation_and_an_exported_copy_ask_the_same_segmenter(run, config, tmp_path):
    saved = read_segmenter(run / "segmenter" / "model", config.chunking)
    assert saved is not None
    text = b"And the king said to his servants, Go."
    expected = saved.chunker(2, config.chunking.max_bytes).chunk_start(text).tolist()
    export_run(run, tmp_path / "copy")
    pipeline = read_pipeline(tmp_path / "copy" / "pipeline")
    assert pipeline.autoencoder.chunker.chunk_start(text).tolist() == expected
    assert pipeline("And the king", max_characters=20).texts[0]
    evaluation = evaluate_run(run, prompts=0)
    assert evaluation["characters_per_chunk"] == pytest.approx(config.chunking.target_bytes, rel=0.2)


def test_stage_one_resumes_with_the_segmenter_it_has(run, config, tmp_path):
    name = f"{config.name}-resumed"
    shutil.copytree(run / "segmenter", tmp_path / name / "segmenter")
    weights = tmp_path / name / "segmenter/model/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    shutil.copytree(run / "autoencoder", tmp_path / name / "autoencoder")
    train_autoencoder(replace(config, name=name), resume=True, root=tmp_path)
    assert weights.read_bytes() == before


def test_minutes_that_a_segmenter_took_do_not_skip_the_warm_up(config, tmp_path):
    segmenter = replace(config.chunking.segmenter, steps=10**6, minutes=1.0)
    config = replace(config, chunking=replace(config.chunking, segmenter=segmenter))
    config = replace(config, logging=replace(config.logging, every=1))
    run = train_autoencoder(stage_training(config, "autoencoder", minutes=0.25, steps=10**6), root=tmp_path)
    logged = [json.loads(line) for line in (run / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in logged if "learning_rate" in line]
    assert rates[0] < max(rates) / 2 and rates[-1] < max(rates) / 2
    assert (
        json.loads((run / "autoencoder" / "totals.json").read_text())["prepared"] >= 3
    )  # a fifth of 15 seconds


def test_a_segmenter_of_another_run_is_refused(run, config, tmp_path):
    copy = tmp_path / config.name
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "prior")
    shutil.rmtree(copy / "segmenter")
    path = copy / "pipeline" / "segmenter"
    other = train_other(config, tmp_path / "elsewhere")
    shutil.copytree(other / "segmenter", copy / "segmenter")
    with pytest.raises(ValueError, match="trained on another segmenter's chunks"):
        train_diffusion(config, root=tmp_path)
    shutil.rmtree(path)
    with pytest.raises(ValueError, match="segmenter holds no model"):
        read_pipeline(copy / "pipeline")


def train_other(config: Config, root: Path) -> Path:
    """The same run from another seed, its first stage."""
    return train_autoencoder(replace(config, seed=7), root=root)


def test_a_segmenter_cut_short_is_made_anew(config, tmp_path):
    leftover = tmp_path / config.name / "segmenter" / "model.new"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text(json.dumps({}))
    run = train_autoencoder(config, root=tmp_path)
    assert not leftover.exists() and (run / "segmenter" / "model" / "config.json").is_file()
