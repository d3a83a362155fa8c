"""The run that comes with hldm is whole, small, and writes; so is its twin."""

from __future__ import annotations

import pytest
from conftest import ROOT

from hldm import cli
from hldm.config import load_config
from hldm.generation.pipeline import read_pipeline
from hldm.runs.folder import shipped_run

MEGABYTE = 10**6


@pytest.mark.parametrize("twin", [False, True])
def test_it_is_what_its_config_says_and_small(twin):
    folder = shipped_run(twin)
    config = load_config([folder / "autoencoder/config.yaml"])
    assert config.is_twin == twin
    pipeline = read_pipeline(folder / "pipeline")
    assert (pipeline.prior is None) == twin
    assert pipeline.autoencoder.settings == config.autoencoder
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 8.2 * MEGABYTE
    # the shape that configs/small.yaml has now, so that the card speaks of what one would train
    name = "small-twin.yaml" if twin else "small.yaml"
    now = load_config([ROOT / "configs" / name])
    assert (now.autoencoder, now.prior, now.chunking) == (config.autoencoder, config.prior, config.chunking)


def test_without_a_run_generate_writes_with_it(capsysbinary):
    assert cli.generate(["--prompt", "And the king said", "--max-chars", "60"]) == 0
    text = capsysbinary.readouterr().out.decode()
    assert text.startswith("And the king said") and len(text) > 60
