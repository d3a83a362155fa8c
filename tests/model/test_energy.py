"""A head that draws a latent in one step learns from samples alone, and the bound stays as it was."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL
from torch import Tensor

from hldm.config import ConfigError, EnergyConfig, GenerationConfig, load_config
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.generation.writer import row_generators
from hldm.model.contextualiser import Context
from hldm.model.energy import EnergyHead, energy_score
from hldm.model.mixture import draw_rows
from hldm.model.prior import Prior
from hldm.runs.progress import describe
from hldm.studies import judge
from tests.generation.test_writer import PROMPTS, make_model, write
from tests.training.test_objectives import make_objective, run, small

ONE_STEP = GenerationConfig(scheduler="energy")


def knowing(summary: Tensor) -> Context:
    """A context that says no more than this. summary: (b n d)."""
    nothing = summary.new_zeros(*summary.shape[:2], 0)
    return Context(summary, nothing, nothing, nothing, nothing, nothing)


def test_the_score_is_its_double_sum_written_out():
    torch.manual_seed(0)
    samples, targets = torch.randn(3, 5, 2).double(), torch.randn(3, 4, 2).double()
    for row, found in enumerate(energy_score(samples, targets, exponent=1.3)):
        y, x = samples[row], targets[row]
        away = sum(float((a - b).norm()) ** 1.3 for a in x for b in y)
        apart = sum(float((y[j] - y[k]).norm()) ** 1.3 for j in range(5) for k in range(5) if j != k)
        assert float(found) == pytest.approx(2 / 20 * away - apart / 20)


def test_the_right_distribution_scores_below_one_that_is_moved_shrunk_or_widened():
    torch.manual_seed(0)
    chunks = 4000
    targets = torch.randn(chunks, 2, 3)
    drawn = torch.randn(chunks, 8, 3)
    right = energy_score(drawn, targets)
    for wrong in (drawn + 0.5, 0.6 * drawn, 1.6 * drawn, drawn[..., :1].expand(-1, -1, 3)):
        excess = energy_score(wrong, targets) - right
        assert excess.mean() > 4 * excess.std() / math.sqrt(chunks)


def test_samples_that_meet_have_a_gradient():
    samples = torch.zeros(4, 2, requires_grad=True)
    energy_score(samples, torch.ones(2, 2), exponent=0.7).backward()  # a power of 0 with an infinite slope
    assert samples.grad is not None and samples.grad.isfinite().all() and samples.grad.any()


def test_a_head_learns_two_modes_and_where_the_context_puts_them():
    """From N(0, I): a latent lies at plus or minus a place that the context says, never in between."""
    torch.manual_seed(0)
    head = EnergyHead(EnergyConfig(width=32, layers=2), latent_dim=2, context_dim=16)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    says = torch.randn(2, 16)  # how the context puts a place

    def places(chunks: int) -> Tensor:
        angle = 2 * math.pi * torch.rand(1, chunks)
        return 2 * torch.stack([angle.cos(), angle.sin()], dim=-1)

    for _ in range(400):
        place = places(64)
        side = torch.randint(2, (1, 64, 8, 1)) * 2 - 1
        targets = side * place[:, :, None] + 0.1 * torch.randn(1, 64, 8, 2)
        loss = energy_score(head(torch.randn(1, 64, 8, 2), knowing(place @ says)), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        place = places(200)
        drawn = head(torch.randn(1, 200, 50, 2), knowing(place @ says))
    along = (drawn * place[:, :, None]).sum(-1) / 4  # 1 and -1 at the two places
    across = (drawn - along[..., None] * place[:, :, None]).norm(dim=-1)
    assert 0.3 < (along > 0).float().mean() < 0.7
    assert ((along.abs() - 1).abs() < 0.4).float().mean() > 0.8
    assert across.mean() < 0.4


@pytest.mark.parametrize("rate", ["mixture", "diffusion"])
def test_a_head_that_has_learnt_nothing_draws_what_it_starts_from(rate):
    _, prior = make_model(rate=rate, one_step="energy")
    rows, features = 5, prior.contextualiser.feature_dim
    context = knowing(torch.randn(rows, 1, 16))._replace(feature=torch.randn(rows, 1, features))
    u, noise = draw_rows(4, row_generators(3, rows), torch.device("cpu"))
    with torch.no_grad():
        found = prior.draw_once(context, u[:, None], noise[:, None], temperature=0.8)[:, 0, 0]
        expected = 0.8 * noise[:, 0]
        if prior.mixture is not None:
            weights = prior.mixture.log_weights(context.feature[:, 0])
            expected = prior.mixture.sample(prior.diffusion.gamma_0, weights, row_generators(3, rows), 0.8)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rate", ["mixture", "diffusion"])
def test_a_head_beside_the_denoiser_leaves_the_bound_as_it_is(rate):
    config = small(f"autoencoder.rate={rate}")
    plain = make_objective(config, "prior")
    config_beside = small(f"autoencoder.rate={rate}", "prior.one_step=energy")
    objective = make_objective(config_beside, "prior")
    objective.load_state_dict(plain.state_dict(), strict=False)
    without, beside = run(plain, config, steps=2), run(objective, config_beside, steps=2)
    torch.testing.assert_close(beside.nats, without.nats)
    assert not without.scores
    assert beside.loss > without.loss and beside.scores["energy"] > 0


def test_the_score_is_reported_and_counted_in_no_sum():
    metrics = {"latent": 0.7, "end": 0.1, "energy": 5.0, "characters_per_second": 1.0}
    assert describe(metrics).startswith("0.800 bits/char (latent 0.700 + end 0.100)")


@pytest.mark.parametrize("rate", ["mixture", "diffusion"])
def test_writing_in_one_step_is_seeded_and_each_row_on_its_own(rate):
    model = make_model(rate=rate, one_step="energy", reads_text=True)
    torch.nn.init.normal_(model[1].energy.outputs.weight, std=0.3)
    together = write(model, PROMPTS, ONE_STEP, seed=7, through_ends=True)
    alone = [
        write(model, [prompt], ONE_STEP, seed=7 + i, through_ends=True)[0] for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone != write(model, PROMPTS, ONE_STEP, seed=8, through_ends=True)
    assert together == write(model, PROMPTS, replace(ONE_STEP, steps=0), seed=7, through_ends=True)
    assert together != write(model, PROMPTS, GenerationConfig(steps=1), seed=7, through_ends=True)


def test_a_pipeline_remembers_its_head_and_takes_another_sampler(tmp_path):
    from hldm.model.diffusion import make_scheduler
    from hldm.runs.files import fingerprint

    autoencoder, prior = make_model(rate="mixture", one_step="energy")
    prior.register_to_config(autoencoder=fingerprint(autoencoder.state_dict()))
    torch.nn.init.normal_(prior.energy.outputs.weight, std=0.3)
    HLDMPipeline.assemble(autoencoder, prior, ONE_STEP).save_pretrained(tmp_path / "pipeline")
    pipeline = read_pipeline(tmp_path / "pipeline")
    assert pipeline.settings == ONE_STEP
    assert pipeline("And", max_characters=20).calls == len(pipeline("And", max_characters=20).chunk_spans[0])
    pipeline.scheduler = make_scheduler("ddim", pipeline.prior.schedule, 4)
    assert pipeline.settings.scheduler == "ddim"


def test_a_prior_without_the_head_says_so():
    with pytest.raises(ConfigError, match=r"prior\.one_step=energy"):
        write(make_model(rate="mixture"), PROMPTS, ONE_STEP)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (["generation.scheduler=energy"], "generation.scheduler=energy needs prior.one_step=energy"),
        (["prior.one_step=consistency"], "prior.one_step"),
        (["prior.energy.samples=1"], "prior.energy.samples must lie in 2..4096, got 1"),
        (["prior.energy.targets=0"], "prior.energy.targets must be positive, got 0"),
        (["prior.energy.exponent=2"], "prior.energy.exponent must lie between 0 and 2, got 2"),
        (
            ["prior.one_step=energy", "generation.scheduler=energy", "generation.guidance=2"],
            "generation.guidance must be 1 with generation.scheduler=energy",
        ),
    ],
)
def test_a_mistake_gets_one_line(override, says):
    with pytest.raises(ConfigError) as error:
        load_config([ROOT / "configs/tiny.yaml"], [*SMALL, *override])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_saved_prior_without_the_new_settings_still_loads():
    _, prior = make_model()
    old = {
        name: value for name, value in asdict(prior.settings).items() if name not in ("one_step", "energy")
    }
    again = Prior(4, old, asdict(prior.hierarchy), asdict(prior.diffusion))
    assert again.settings == prior.settings and again.energy is None


def test_judging_varies_what_the_sampler_heeds_and_the_prior_can_do():
    def varied(settings: GenerationConfig, head: object) -> set[str]:
        pipeline = SimpleNamespace(settings=settings, prior=SimpleNamespace(mixture=None, energy=head))
        names = ("steps", "scheduler", "guidance")
        pairs = [(name, value) for name in names for value in judge.VARIATIONS[name]]
        return {f"{name} {value}" for name, value in pairs if judge._makes_sense(pipeline, name, value)}

    plain, beside, alone = (
        varied(GenerationConfig(), None),
        varied(GenerationConfig(), 1),
        varied(ONE_STEP, 1),
    )
    assert beside - plain == {"scheduler energy"} and "steps 0" not in plain and "steps 64" in plain
    assert alone == {"scheduler ancestral", "scheduler ddim", "scheduler dpm"}
