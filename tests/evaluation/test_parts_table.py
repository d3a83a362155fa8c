"""The parts table of a run: complete, comparable with other runs alone where it may be, and shown."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bound import lay_out, make_model, make_text

from hldm import cli
from hldm.evaluation import sampled
from hldm.evaluation.bound import held_out_windows
from hldm.evaluation.parts import SHORT
from hldm.evaluation.parts_table import parts_of_run, short_parts, short_tables, tables
from hldm.evaluation.reconstruction import read_windows
from hldm.evaluation.sampled import STEPS, finite_steps, share_sure
from hldm.evaluation.worth import STRETCH_BYTES, Worth, clusters_of, least, paired_worth
from hldm.generation.pipeline import read_pipeline
from hldm.model.diffusion import end_term
from hldm.training.stages import train_autoencoder


@pytest.fixture(scope="module", autouse=True)
def few_places():
    """Few latents are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled, "PLACES", 6)
        yield


@pytest.fixture(scope="module")
def others(trained_run, tmp_path_factory):
    """A copy of the trained run as `again`, and a twin."""
    from conftest import ROOT, SMALL

    from hldm.config import changed, load_config

    root = tmp_path_factory.mktemp("others")
    shutil.copytree(trained_run, root / "again")
    data = load_config([trained_run / "autoencoder/config.yaml"]).data
    overrides = [setting for setting in SMALL if "latent_dim" not in setting]
    config = load_config([ROOT / "configs/tiny-twin.yaml"], [*overrides, "training.autoencoder.steps=2"])
    train_autoencoder(changed(config, name="twin", data=data), root=root)
    return root


@pytest.fixture(scope="module")
def parts(trained_run, others):
    return parts_of_run(
        trained_run,
        twin=others / "twin",
        without={"denoiser": others / "again", "latent": others / "twin"},
        draws=4,
    )


@pytest.mark.slow
def test_a_run_trained_without_a_part_stands_beside_the_hidden_one(parts):
    again, twin = (parts["rows"][name] for name in ("denoiser", "latent"))
    # a copy is the same model: it loses nothing but the noise of other draws
    assert abs(again["retrained"]["bits"]) < 0.05 and again["retrained"]["run"] == "again"
    for row in (again, twin):
        assert row["worth"]["bits"] == min(row["hidden"]["bits"], row["retrained"]["bits"])
    assert parts["rows"]["context"]["retrained"] is None
    shown = "\n".join(map(str, tables(parts)))
    assert "retrained" in shown and "twin was trained for" in shown


def test_the_block_of_an_evaluation_is_shown_and_a_twin_has_none(trained_run):
    pipeline = read_pipeline(trained_run / "pipeline")
    windows = lay_out(make_text())
    found = short_parts(pipeline.autoencoder, pipeline.prior, windows, seed=0)
    assert list(found["rows"]) == [name for name in SHORT if name in found["rows"]]
    assert {"denoiser", "context", "trunk", "latent"} <= set(found["rows"])
    assert "steps" not in found and "denoiser" in "\n".join(map(str, short_tables(found)))
    assert short_tables(None) == []


def test_every_figure_is_there_and_fits_into_json(parts):
    assert json.loads(json.dumps(parts, allow_nan=False)) == parts
    assert [row["steps"] for row in parts["steps"]] == sorted(row["steps"] for row in parts["steps"])
    assert {row["steps"] for row in parts["steps"]} == set(STEPS)
    assert set(parts["deviation"]) == {"0", "2", "64"}
    for share in (parts["sure"]["model"], parts["sure"]["twin"], parts["agreement"]["share"]):
        assert 0 <= share <= 1


def test_the_command_writes_numbers_and_a_picture(trained_run, others, tmp_path, capsys):
    targets = [str(tmp_path / name) for name in ("p.json", "p.png")]
    given = ["diagnose", "--parts", "--run", str(trained_run), "--draws", "2"]
    given += ["--without", f"denoiser={others / 'again'}", "--json", targets[0], "--png", targets[1]]
    assert cli.main(given) == 0
    said = capsys.readouterr().out
    assert "denoising steps" in said and "measured in" in said
    assert "rows" in json.loads(Path(targets[0]).read_text())
    assert Path(targets[1]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--twin", "{root}/twin"], "give --parts"),
        (["--parts", "--without", "denoiser"], "PART=RUN"),
        (["--parts", "--without", "denoiser=a", "--without", "denoiser=b"], "twice"),
        (["--parts", "--without", "nose={root}/again"], "no part 'nose'"),
        (["--parts", "--without", "denoiser={run}"], "the run itself"),
        (["--parts", "--twin", "{root}/again"], "has latents"),
        (["--parts", "--draws", "3"], "even"),
        (["--parts", "--without", "denoiser={root}/nowhere"], "is no folder here"),
    ],
)
def test_a_mistake_is_one_line(given, reason, trained_run, others, refused):
    options = [text.format(root=others, run=trained_run) for text in given]
    assert reason in refused(cli.main(["diagnose", "--run", str(trained_run), *options]))


def test_a_twin_has_no_parts(others, refused):
    assert "is a twin" in refused(cli.main(["diagnose", "--parts", "--run", str(others / "twin")]))


def test_a_run_of_another_text_is_refused(trained_run, others, tmp_path, refused):
    other = shutil.copytree(others / "again", tmp_path / "other")
    totals = other / "autoencoder/totals.json"
    totals.write_text(json.dumps({**json.loads(totals.read_text()), "corpus": "0" * 64}))
    given = ["diagnose", "--parts", "--run", str(trained_run), "--without", f"denoiser={other}"]
    assert "the same text" in refused(cli.main(given))


# ---- worths and clusters


def test_a_worth_is_a_difference_by_characters_and_its_error_is_of_the_clusters():
    whole, characters = np.array([3.0, 5.0, 9.0]), np.array([10, 20, 0])
    unit = characters[:2].sum() * np.log(2)
    even = paired_worth(whole + [1.0, 2.0, 7.0], whole, characters)  # the third has no characters
    assert even == pytest.approx((3 / unit, 0.0))
    uneven = paired_worth(whole + [3.0, 0.0, 0.0], whole, characters)
    assert uneven.bits == pytest.approx(3 / unit)
    assert uneven.standard_error == pytest.approx(
        2 * np.sqrt(2) * np.sqrt(2) / np.sqrt(2) * np.sqrt(2) / unit
    )
    assert least(Worth(0.2, 0.1), Worth(-0.1, 0.2)) == Worth(-0.1, 0.2)


def test_clusters_are_the_same_stretches_however_the_text_is_cut():
    corpus = make_text()
    model, _ = make_model()
    cut = held_out_windows(model, corpus)
    clusters, others = clusters_of(cut), clusters_of(lay_out(corpus))
    assert clusters.characters.sum() == cut.characters
    assert len(clusters.characters) == len(others.characters)
    assert len(clusters.characters) == sum(-(-len(document) // STRETCH_BYTES) for document in corpus)
    some = np.arange(cut.chunks) < 7
    assert clusters_of(cut, some).sums(np.ones(cut.chunks)).sum() == 7


# ---- samplers


@torch.no_grad()
def test_the_cost_of_every_sampler_is_the_one_in_closed_form():
    """Without a mixture v = 0 at first: mu_hat = alpha z, of error sigma^4 |mu|^2 + alpha^2 sigma^2 d."""
    autoencoder, prior = make_model(components=0, reads_text=True)
    windows = lay_out(make_text())
    mu = torch.cat([encoding.latents[encoding.mask] for _, encoding in read_windows(autoencoder, windows)])
    found = {row["steps"]: row for row in finite_steps(autoencoder, prior, windows, torch.Generator())}
    square = mu.square().sum(dim=-1).mean().double()
    unit = windows.characters / len(mu) * math.log(2)
    end = end_term(mu, prior.diffusion.gamma_1).mean()
    assert [*found] == [*STEPS[1:]]
    for steps in found:
        gamma = prior.schedule.gamma(torch.linspace(0, 1, steps + 1)).double()
        sigma_square = torch.sigmoid(gamma[1:])
        error = sigma_square**2 * square + (1 - sigma_square) * sigma_square * prior.latent_dim
        expected = 0.5 * ((-gamma).exp().diff().neg() * error).sum() + end
        assert found[steps]["bits"] == pytest.approx(float(expected) / unit, rel=0.15), steps


@torch.no_grad()
@pytest.mark.parametrize("components", [1, 20])
def test_steps_that_draw_from_the_mixture_cost_the_same_however_many_they_are(components):
    """Where the network has nothing to add, and the mixture, made noisy, is the normal that steps start from."""
    autoencoder, prior = make_model(components=components, reads_text=True)
    if components == 1:
        torch.nn.init.zeros_(prior.mixture.prototypes)
        torch.nn.init.zeros_(prior.mixture.log_deviation)
    windows = lay_out(make_text())
    rows = finite_steps(autoencoder, prior, windows, torch.Generator().manual_seed(0))
    assert len(rows) == len(STEPS)
    for row in rows:
        assert abs(row["over"]) < 4 * row["standard_error"] + (0.01 if components > 1 else 0), row


@pytest.mark.parametrize("latent_dim", [0, 4])
def test_a_decoder_is_sure_of_what_its_bias_says_and_of_nothing_without(latent_dim):
    autoencoder, prior = make_model(latent_dim)
    windows, generator = lay_out(make_text()), torch.Generator().manual_seed(0)
    torch.nn.init.zeros_(autoencoder.outputs.weight)
    assert share_sure(autoencoder, prior, windows, generator) == 0
    autoencoder.outputs.bias.data[101] = 20.0
    assert share_sure(autoencoder, prior, windows, generator) == 1
