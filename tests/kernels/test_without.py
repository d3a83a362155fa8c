"""With hldm/kernels deleted everything works: the same training, bound and text, in torch alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hldm
from hldm.model.ops import linear_scan

ROOT = Path(__file__).resolve().parents[2]

# Two steps of both stages of a small model, its bound, and what it and the shipped model write.
WORK = """
import json, sys
from importlib.util import find_spec
from pathlib import Path

import torch

import hldm
from hldm.config import changed

tiny, root, overrides = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
config = changed(hldm.load_config([tiny], overrides), name="small")
hldm.train_autoencoder(config, root=root)
folder = hldm.train_diffusion(config, root=root)
found = hldm.evaluate(folder, split="validation", draws=2, prompts=0)
from hldm.generation.pipeline import read_pipeline
from hldm.runs.folder import shipped_run
shipped = read_pipeline(shipped_run(False) / "pipeline")
twin = read_pipeline(shipped_run(True) / "pipeline")
prompts = ["And the king said", "In the beginning"]
texts = [
    pipeline(prompts, max_characters=40, seed=3, **settings).texts
    for pipeline in (shipped, twin)
    for settings in ({"decoder_temperature": 0.0}, {"guidance_scale": 1.5}, {"num_inference_steps": 0})
]
metrics = [
    {name: value for name, value in json.loads(line).items() if "second" not in name}
    for stage in ("autoencoder", "prior")
    for line in (folder / stage / "metrics.jsonl").read_text().splitlines()
]
kernels = find_spec("hldm.kernels") is not None
print(json.dumps({"home": hldm.__file__, "kernels": kernels, "found": found, "metrics": metrics, "texts": texts}))
"""


def work(home: Path, root: Path, overrides: list[str], **variables: str) -> dict[str, Any]:
    """What WORK prints with the hldm that lies in home."""
    overrides = [*overrides, "training.autoencoder.steps=2", "training.prior.steps=2"]
    ran = subprocess.run(
        [sys.executable, "-c", WORK, str(ROOT / "configs/tiny.yaml"), str(root), json.dumps(overrides)],
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(home), **variables},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert Path(found["home"]).is_relative_to(home)
    return found


@pytest.fixture
def without_package(tmp_path: Path) -> Path:
    """A folder with all of hldm but its kernels."""
    shutil.copytree(ROOT / "hldm", tmp_path / "hldm", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    return tmp_path


@pytest.mark.slow
def test_a_layer_needs_no_kernels(without_package):
    told = subprocess.run(
        [sys.executable, "-c", "import hldm; print(hldm.linear_scan, hldm.Griffin)"],
        cwd=without_package,
        env=os.environ | {"PYTHONPATH": str(without_package)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "hldm.model.griffin.Griffin" in told.stdout
    assert hldm.linear_scan is linear_scan


@pytest.mark.slow
@pytest.mark.timeout(900)  # three processes, each of which trains, measures and writes
def test_everything_works_without_the_package_and_writes_the_same(without_package, small_overrides, tmp_path):
    plain = work(without_package, tmp_path / "plain", small_overrides)
    in_torch = work(ROOT, tmp_path / "torch", small_overrides, HLDM_KERNELS="0")
    fast = work(ROOT, tmp_path / "fast", small_overrides)
    assert not plain["kernels"] and in_torch["kernels"] and fast["kernels"]
    assert len(plain["metrics"]) == 4  # two steps of two stages
    for other in (in_torch, fast):
        assert plain["texts"] == other["texts"]
        torch.testing.assert_close(plain["metrics"], other["metrics"], rtol=1e-4, atol=1e-4)
        bounds = [ran["found"]["bits_per_character"]["bound"] for ran in (plain, other)]
        torch.testing.assert_close(*bounds, rtol=1e-4, atol=1e-4)
