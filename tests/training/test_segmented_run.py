"""A run whose chunks a segmenter cuts: made before stage one, kept with the run, asked by everything after."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from conftest import ROOT, segmenters_of

from hldm.chunking.strategies import chunker_of, read_segmenter
from hldm.config import Config, Strategy, changed, stage_training
from hldm.evaluation.evaluate import evaluate_run
from hldm.generation.pipeline import read_pipeline
from hldm.runs.export import export_run
from hldm.training.stages import train_autoencoder, train_diffusion, train_run

# rules alone, as `fixed` and `phrase` are; segmenters that differ from the others in what they score, not in what a
# run does with them; and the one of the run that the tests share
ALIKE = ("space", "words", "sentence", "paragraph", "entropy", "gate", "queries", "state_change")
# what each rank's autoencoder is bound to, and cuts a text into
TELLING = """
import os, sys
from pathlib import Path
from hldm import cli
from hldm.chunking.segmenter import Segmenter, Settings
from hldm.chunking.strategies import chunker_of
from hldm.training import stages

Segmenter.settings = Settings(width=16, layers=1, lanes=2, steps=5)
attach = stages.attach_segmenter

def telling(autoencoder, segmenter):
    attach(autoencoder, segmenter)
    starts = chunker_of(autoencoder).chunk_start(b"And the king said to his servants, Go.").tolist()
    Path(f"rank-{os.environ['RANK']}").write_text(f"{autoencoder.config['segmenter']} {starts}")

stages.attach_segmenter = telling
sys.exit(cli.train_autoencoder(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> dict[str, Path]:
    """The run that the tests share, once there is one."""
    return {"root": tmp_path_factory.mktemp("segmented")}


@pytest.fixture
def config(small_config: Config, small_segmenters: None) -> Config:
    chunking = changed(small_config.chunking, strategy="state_change", min_bytes=2)
    return changed(small_config, chunking=chunking)


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(strategy, marks=pytest.mark.slow if strategy in ALIKE else ())
        for strategy in get_args(Strategy)
    ],
)
def test_every_strategy_trains_evaluates_and_writes(strategy, config, tmp_path):
    config = changed(config, chunking=changed(config.chunking, strategy=strategy))
    for stage in ("autoencoder", "prior"):
        config = stage_training(config, stage, steps=2)
    run = train_run(config, root=tmp_path)
    evaluation = evaluate_run(run, prompts=2, draws=2)
    assert 0 < evaluation["bits_per_character"]["bound"] < 100 and 0 <= evaluation["rechunked"] <= 1
    pipeline = read_pipeline(run / "pipeline")
    written = pipeline("And the king", max_characters=30)
    length = [end - begin for begin, end in written.chunk_spans[0]]
    assert length and min(length) > 0 and max(length) <= config.chunking.max_bytes


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
    assert chunker_of(pipeline.autoencoder).chunk_start(text).tolist() == expected
    assert pipeline("And the king", max_characters=20).texts[0]
    evaluation = evaluate_run(run, prompts=0)
    assert evaluation["characters_per_chunk"] == pytest.approx(config.chunking.target_bytes, rel=0.2)


def test_stage_one_resumes_with_the_segmenter_it_has(run, config, tmp_path):
    name = f"{config.name}-resumed"
    shutil.copytree(run / "segmenter", tmp_path / name / "segmenter")
    weights = tmp_path / name / "segmenter/model/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    shutil.copytree(run / "autoencoder", tmp_path / name / "autoencoder")
    train_autoencoder(changed(config, name=name), resume=True, root=tmp_path)
    assert weights.read_bytes() == before


def test_minutes_that_a_segmenter_took_do_not_skip_the_warm_up(config, tmp_path):
    config = changed(config, logging=changed(config.logging, every=1))
    config = stage_training(config, "autoencoder", minutes=0.1, steps=10**6)
    with segmenters_of(width=16, layers=1, lanes=2, window_bytes=64, steps=10**6):
        run = train_autoencoder(config, root=tmp_path)
    logged = [json.loads(line) for line in (run / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in logged if "learning_rate" in line]
    assert rates[0] < max(rates) / 2 and rates[-1] < max(rates) / 2
    totals = json.loads((run / "autoencoder" / "totals.json").read_text())
    assert totals["prepared"] >= 1  # a fifth of 6 seconds


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
    return train_autoencoder(changed(config, seed=7), root=root)


def test_a_segmenter_cut_short_is_made_anew(config, tmp_path):
    leftover = tmp_path / config.name / "segmenter" / "model.new"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text(json.dumps({}))
    run = train_autoencoder(config, root=tmp_path)
    assert not leftover.exists() and (run / "segmenter" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_two_processes_train_one_segmenter_and_both_cut_by_it(tmp_path, small_overrides):
    (tmp_path / "telling.py").write_text(TELLING)
    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--name", "two", *small_overrides]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    port = ["--main_process_port", str(29_500 + os.getpid() % 1000)]
    two = subprocess.run(
        [*launch, *port, "telling.py", *arguments, "chunking.strategy=state_change", "chunking.min_bytes=2"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr[-3000:]
    told = [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and "True" in told[0].partition("[True")[2]
    assert two.stdout.count("bytes a chunk at threshold") == 1  # rank 1 trained none
    assert len(list((tmp_path / "runs/two/segmenter").glob("boundaries-*"))) == 1
