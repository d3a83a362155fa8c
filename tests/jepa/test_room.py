"""What a run of the family needs is known before it starts, and what does not fit is refused with numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from jepa_small import SMALL, small

from hldm import cli
from hldm.chunking.chunker import make_chunker
from hldm.config import ConfigError
from hldm.jepa import room
from hldm.jepa.config import JepaConfig, load_jepa_config
from hldm.jepa.room import require_room_of, sizes_of
from hldm.jepa.text_pairs import pairs_of, read_corpora
from hldm.jepa.train import make_objective
from hldm.runs.machine import peak_memory
from hldm.text.windows import Windows

TASKS = {
    "chunks": ["objective.option=latents"],
    "masked": ["objective.option=masked"],
    "sentences": ["task=sentences", "views.kind=none", "objective.option=latents", "sentences.max_bytes=60"],
    "pairs": ["task=pairs", "objective.option=latents", "pairs.source=sums", "pairs.count=300"],
}


def built(config: JepaConfig):
    """The objective with memory, and its text laid out."""
    corpora = read_corpora(config)
    corpus, chunker = corpora["train"], make_chunker(config.chunking)
    if config.task == "chunks":
        windows = Windows(corpus, chunker, lanes=config.data.lanes, window_bytes=config.data.window_bytes)
    else:
        windows = pairs_of(config, corpus, corpus, chunker, config.data.lanes)
    return make_objective(config, windows), windows, corpora


@pytest.mark.parametrize("task", TASKS)
def test_weights_and_all_that_follows_from_them_are_exact(task):
    config = small(*TASKS[task])
    objective, _, corpora = built(config)
    found = sizes_of(config, "jepa", corpora).device
    state = objective.state_dict()
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    weights = 4 * sum(p.numel() for p in objective.parameters())
    assert found["parameters"] == found["averaged weights"] == size
    assert (found["gradients"], found["optimizer state"]) == (weights, 2 * weights)  # AdamW has two moments
    decoder = sizes_of(small(*TASKS["chunks"]), "decoder", corpora).device if task == "chunks" else None
    assert decoder is None or decoder["parameters"] > size > decoder["gradients"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc of Linux")
@pytest.mark.parametrize("task", ["chunks", "sentences"])
def test_activations_are_near_what_a_step_takes_at_its_peak(task):
    config = load_jepa_config([ROOT / "configs/jepa-tiny.yaml"], [*TASKS[task], "data.lanes=32"])
    objective, windows, corpora = built(config)

    def step() -> None:
        batch, carry = windows.batch(0), objective.initial_carry(32, torch.device("cpu"))
        objective(batch, carry, torch.Generator(), 0.0).loss.backward()
        for parameter in objective.parameters():
            parameter.grad = None

    step()
    _, peak = peak_memory(step)
    assert peak is not None
    assert 0.7 < sizes_of(config, "jepa", corpora).device["activations"] / peak < 2.5


def test_what_does_not_fit_is_refused_in_one_line_and_leaves_no_folder(
    corpus_path, tmp_path, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, "available_memory", lambda: (300 * 2**20, "in this cgroup"))
    arguments = ["--config", str(ROOT / "configs/jepa-tiny.yaml"), *SMALL, f"data.path={corpus_path}"]
    assert "training.jepa needs about" in refused(cli.jepa(["train", *arguments, "data.lanes=4000"]))
    assert not Path("runs").exists()
    config = small("objective.option=latents")
    monkeypatch.setattr(room, "available_memory", lambda: (2**50, "on this machine"))
    monkeypatch.setattr(room, "free_disk", lambda root: (1000, root))
    with pytest.raises(ConfigError, match=r"of disk, 1000 bytes available in .*checkpoint.keep"):
        require_room_of(config, "decoder", read_corpora(config))
