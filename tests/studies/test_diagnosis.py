"""What the diagnosis says adds up to the bound, and is right where the answer is known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from hldm import cli
from hldm.studies.diagnosis import _statistics, diagnose_run, summary


@pytest.fixture(scope="module")
def diagnosis(trained_run):
    return diagnose_run(trained_run, split="validation", draws=16)


def test_the_parts_add_up_to_the_bound(diagnosis):
    bits, unit = diagnosis["bits_per_character"], diagnosis["characters"]
    # latent bits by dimension and by level are a second estimate, without the small end term
    for key in ("latent_by_dimension", "latent_by_level"):
        parts = [row["bits"] if isinstance(row, dict) else row for row in diagnosis[key]]
        assert sum(parts) == pytest.approx(bits["latent"], rel=0.15)
    places = sum(row["bits"] * row["symbols"] for row in diagnosis["by_place"])
    assert places / unit == pytest.approx(bits["decoder"], rel=1e-4)
    own = diagnosis["decoder"]["with_latents"]["own"]["bits"]
    assert own == pytest.approx(bits["decoder"], rel=0.05)


def test_every_figure_is_shown_and_fits_into_json(diagnosis):
    shown = "\n".join(map(str, summary(diagnosis)))
    assert "effective rank" in shown and "other document" in shown
    assert len(diagnosis["neighbours"]) == 12
    assert json.loads(json.dumps(diagnosis, allow_nan=False)) == diagnosis


def test_the_command_writes_numbers_and_a_picture(trained_run, tmp_path, capsys):
    targets = [str(tmp_path / name) for name in ("d.json", "d.svg")]
    code = cli.main(
        ["diagnose", "--run", str(trained_run), "--draws", "2", "--json", targets[0], "--figure", targets[1]]
    )
    said = capsys.readouterr().out
    assert code == 0 and "the decoder reads" in said
    assert said.endswith(f"wrote {targets[0]}\nwrote {targets[1]}\n")
    assert json.loads((tmp_path / "d.json").read_text())["run"] == "small"
    assert (tmp_path / "d.svg").read_bytes().startswith(b"<?xml")


def test_a_mistake_is_one_line(tmp_path, capsys):
    assert cli.main(["diagnose", "--run", str(tmp_path / "none")]) == 2
    assert cli.main(["diagnose", "--run", str(tmp_path), "--png", str(tmp_path / "no/d.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_effective_rank_and_capacity_of_known_latents():
    prior = SimpleNamespace(diffusion=SimpleNamespace(gamma_0=0.0))
    drawn = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
    found = _statistics(drawn, prior)
    assert found["effective_rank"] == pytest.approx(4, rel=0.01)
    assert found["capacity_bits"] == pytest.approx(4 * 0.5, rel=0.02)  # 0.5 log2(1 + 1) a dimension
    copies = _statistics(drawn[:, :1].expand(-1, 4), prior)
    assert copies["effective_rank"] == pytest.approx(1, rel=0.01)
