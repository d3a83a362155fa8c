"""Steering draws from the law it names, does nothing at strength 0, and takes no file but its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_model import tiny_pipeline

from hldm.config import changed
from hldm.generation.branches import make_branches
from hldm.generation.steer import KIND, Guide, _steered_latents, _systematic, read_guide, shapes
from hldm.runs.files import fingerprint
from hldm.text.bytes import END_OF_DOCUMENT

VALUES = ("bad", "good")


def guide_of(pipe, seed: int = 0, scale: float = 1.0) -> Guide:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: scale * torch.randn(shape, generator=generator)
        for name, shape in shapes(pipe.autoencoder, pipe.prior, 2).items()
    }
    return Guide("mood", VALUES, fingerprint(pipe.autoencoder.state_dict()), tensors, {"after": 0.9})


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline(trunk_layers=1)
    pipe.autoencoder.outputs.bias.data[END_OF_DOCUMENT] = -1e9
    return pipe


@pytest.fixture
def far_apart():
    """A model whose mixture's components cannot be mistaken for each other."""
    pipe = tiny_pipeline(trunk_layers=1)
    pipe.prior.mixture.prototypes.data = torch.tensor([[9.0, 9.0], [9.0, -9.0], [-9.0, 9.0], [-9.0, -9.0]])
    pipe.prior.mixture.log_deviation.data.fill_(-3.0)
    return pipe


@pytest.mark.parametrize("method", ["mixture", "particles"])
@pytest.mark.parametrize("steps", [0, 2])
def test_strength_0_writes_what_is_written_without_a_guide(pipe, method, steps):
    settings, prompts = changed(pipe.settings, steps=steps), ["And the king", "", "then"]
    plain = pipe(prompts, max_characters=40, num_inference_steps=steps, seed=4).sequences
    options = dict(method=method, max_characters=40, seed=4, settings=settings)
    found = pipe.steer(prompts, guide_of(pipe), "good", strength=0.0, **options)
    assert [row.text for row in found] == plain
    found = pipe.steer(prompts, guide_of(pipe), "good", strength=5.0, **options)
    assert [row.text for row in found] != plain and all(row.left == 0 for row in found)
    assert found == pipe.steer(prompts, guide_of(pipe), "good", strength=5.0, **options)


@torch.no_grad()
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_components_are_drawn_by_their_weight_times_the_classifiers(far_apart, steps):
    pipe, rows, strength = far_apart, 4000, 1.5
    guide, settings = guide_of(pipe), changed(pipe.settings, steps=steps)
    guide.tensors[
        "next.weight"
    ].zero_()  # else the random classifier is sure of one value whatever the component
    writer = make_branches(pipe.autoencoder, pipe.prior, [b"And the king"], settings, [range(rows)])
    known = writer.encoder.known[:1]
    push = strength * guide.next(known)[0, :, 1]
    log_weights = (pipe.prior.mixture.log_weights(known)[0] + push).log_softmax(dim=-1)
    wanted = log_weights.exp()
    if (
        steps
    ):  # the reverse process starts from N(0, I), which is not quite the noised mixture: E p(k | z_1) remains
        z_1, gamma_1 = torch.randn(200_000, 2), pipe.prior.schedule.gamma(torch.tensor(1.0))
        wanted = pipe.prior.mixture.joint(z_1, gamma_1, log_weights).softmax(dim=-1).mean(dim=0)
        assert not bool(pipe.prior.denoiser.outputs.weight.any())  # the network has nothing to add
    drawn = _steered_latents(writer, guide, 1, strength)
    component = (drawn[:, 0] < 0).long() * 2 + (drawn[:, 1] < 0).long()
    share = torch.bincount(component, minlength=4) / rows
    error = (wanted * (1 - wanted) / rows).sqrt()
    assert bool(((share - wanted).abs() < 4 * error + 1e-3).all()), (share, wanted)
    unsteered = pipe.prior.mixture.log_weights(known)[0].softmax(dim=-1)
    assert bool(((unsteered - wanted).abs() > 8 * error).any())  # else the test could not fail


@torch.no_grad()
def test_particles_raise_what_the_classifier_says_of_the_text(pipe):
    guide = guide_of(pipe, scale=0.1)
    settings = changed(pipe.settings, steps=0)

    def mean_log_p(strength: float, value: str) -> float:
        rows = pipe.steer(
            [""] * 24,
            guide,
            value,
            strength=strength,
            method="particles",
            particles=8,
            max_characters=30,
            settings=settings,
        )
        texts = [row.text for row in rows]
        after = pipe.encode(texts, kind="summaries", pooled=False)
        return float(torch.cat([guide.after(each) for each in after])[:, guide.value(value)].mean())

    for value in VALUES:
        assert mean_log_p(4.0, value) > mean_log_p(0.0, value) + 0.05


def test_systematic_draws_come_as_often_as_their_weight_says():
    weights = torch.tensor([0.5, 0.26, 0.24, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    counts = np.stack([np.bincount(_systematic(weights, generator), minlength=4) for _ in range(500)])
    assert (np.abs(counts - 4 * weights.numpy()) < 1).all()  # each rounded up or down
    np.testing.assert_allclose(counts.mean(axis=0), 4 * weights.numpy(), atol=0.08)


# ---- files


def test_a_guide_comes_back_from_its_file(pipe, tmp_path):
    guide, path = guide_of(pipe), tmp_path / "mood.steer"
    guide.save(path)
    again = read_guide(path, pipe.autoencoder, pipe.prior)
    assert (again.attribute, again.values, again.accuracy) == ("mood", VALUES, {"after": 0.9})
    torch.testing.assert_close(again.tensors, guide.tensors, rtol=0, atol=0)
    guide.save(path)  # over another guide
    (tmp_path / "other").write_text("not mine")
    with pytest.raises(ValueError, match="is no steering classifier"):
        guide.save(tmp_path / "other")
    assert (tmp_path / "other").read_text() == "not mine"
    with pytest.raises(FileNotFoundError, match="no folder"):
        guide.save(tmp_path / "nowhere" / "mood.steer")


def test_a_guide_of_another_model_and_damaged_ones_are_refused(pipe, tmp_path):
    path = tmp_path / "mood.steer"
    guide_of(pipe).save(path)
    other = tiny_pipeline(trunk_layers=1, carry_state=True)
    twin = tiny_pipeline(0, latent_dim=0, carry_state=True)
    for model in (other, twin):
        with pytest.raises(ValueError, match="fitted to another model's latents"):
            model.steer("And", path, "good")
    facts = {"kind": KIND, "attribute": "mood", "values": json.dumps(VALUES), "accuracy": "{}"}
    facts["model"] = fingerprint(pipe.autoencoder.state_dict())
    tensors = guide_of(pipe).tensors

    def refuses(says: str) -> None:
        with pytest.raises(ValueError, match=says) as error:
            read_guide(path, pipe.autoencoder, pipe.prior)
        assert "\n" not in str(error.value)

    save_file({**tensors, "after.bias": torch.tensor([0.0, float("nan")])}, path, metadata=facts)
    refuses("not finite")
    save_file({**tensors, "after.bias": torch.zeros(3)}, path, metadata=facts)
    refuses("other shapes")
    save_file(tensors, path, metadata={**facts, "values": "[1"})
    refuses("is damaged")
    save_file(tensors, path)
    refuses("is no steering classifier")
    path.write_bytes(path.read_bytes()[:100])
    refuses("is no steering classifier")
    with pytest.raises(FileNotFoundError, match="hldm steer fit makes one"):
        read_guide(tmp_path / "none", pipe.autoencoder, pipe.prior)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(strength=float("nan")), "strength must lie in 0..100, got nan"),
        (dict(strength=-1.0), "strength must lie in"),
        (dict(strength=float("inf")), "strength must lie in"),
        (dict(particles=10_000, method="particles"), "particles must lie in 1..256, got 10000"),
        (dict(method="gradient"), "method must be one of mixture, particles"),
        (dict(value="ugly"), "mood is one of bad, good, got 'ugly'"),
        (dict(max_characters=0), "max_characters must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(options, says, pipe):
    value = options.pop("value", "good")
    with pytest.raises(ValueError, match=says):
        pipe.steer("And", guide_of(pipe), value, **options)
    with pytest.raises(ValueError, match="no mixture"):
        shapes(tiny_pipeline(0).autoencoder, tiny_pipeline(0).prior, 2)
