"""Own denoisers and priors: what training, bound and writing rely on is tried when they are loaded."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from hldm import plugins
from hldm.config import ConfigError, PriorConfig
from hldm.generation.own_prior import _small, code_of, prior_class
from hldm.kernels.writer import plain_steps
from hldm.model.prior import Prior

NUMBERS = itertools.count()
FILM = "film:FilmDenoiser"
OURS = "import torch\nfrom hldm.model.denoiser import Denoiser\nfrom hldm.model.prior import Prior\n"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples/own_denoiser")
    monkeypatch.setattr(plugins, "_allowed", {FILM})


def own(source: str) -> str:
    """A class Mine as module:Class, in the working directory, which may run."""
    name = f"own_prior_{next(NUMBERS)}"
    Path(f"{name}.py").write_text(OURS + source)
    plugins.allow([f"{name}:Mine"])
    return f"{name}:Mine"


def forward(expression: str, more: str = "") -> str:
    """A denoiser like ours, but for what it returns; y is what ours does."""
    return own(
        f"class Mine(Denoiser):\n    def forward(self, z, gamma, conditioning, estimate):\n"
        f"        y = super().forward(z, gamma, conditioning, estimate)\n        return {expression}\n{more}"
    )


def test_the_example_and_ours_under_another_name_pass():
    assert prior_class(PriorConfig()) is Prior
    assert prior_class(PriorConfig(denoiser=FILM)) is Prior
    assert prior_class(PriorConfig(denoiser=forward("y"))) is Prior
    mine = own("class Mine(Prior):\n    def build(self):\n        self.more = self.denoiser.outputs\n")
    cls = prior_class(PriorConfig(plugin=mine, denoiser=FILM))
    assert issubclass(cls, Prior) and cls is not Prior
    assert len(code_of(PriorConfig(plugin=mine, denoiser=FILM))) == 33 and code_of(PriorConfig()) == ""


def test_trying_one_draws_nothing_from_the_generator_of_the_run():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    prior_class(PriorConfig(denoiser=forward("y")))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("y[..., :1]", r"forward must return \(b n m z\) = \(2, 5, 2, 3\), got \(2, 5, 2, 1\)"),
        ("y / 0", "not finite"),
        ("y + torch.rand(())", "answers otherwise when asked again"),
        ("y + z.mean(dim=2, keepdim=True)", "must depend on no other draw, chunk or document"),
        ("y + z.mean(dim=1, keepdim=True)", "must depend on no other draw, chunk or document"),
        ("y + z.mean(dim=0, keepdim=True)", "must depend on no other draw, chunk or document"),
        ("y + conditioning[0].value.mean()", "must not depend on that chunk's latent or later ones"),
        ("y * torch.arange(1, z.shape[1] + 1)[:, None, None]", "read chunk by chunk, as it is written"),
        ("(y + 1).detach()", "takes no part in what is trained"),
        (
            "undefined",
            r"failed with NameError: name 'undefined' is not defined \(.*own_prior_\d+.py, line 7\)",
        ),
    ],
)
def test_a_denoiser_that_would_cheat_or_fail_is_refused_in_one_line(expression, says):
    name = forward(expression)
    with pytest.raises(ConfigError, match=says) as error:
        prior_class(PriorConfig(denoiser=name))
    assert f"prior.denoiser={name}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "key", "says"),
    [
        ("class Mine: ...\n", "denoiser", "must be a torch.nn.Module"),
        (
            "class Mine(torch.nn.Module): ...\n",
            "denoiser",
            "lacks read: see hldm.model.own_denoiser.OwnDenoiser",
        ),
        (
            "class Mine(Denoiser):\n    def __init__(self): ...\n",
            "denoiser",
            r"Mine\(config, hierarchy, latent_dim\) failed with TypeError",
        ),
        ("class Mine(torch.nn.Module): ...\n", "plugin", "must be a subclass of hldm.model.prior.Prior"),
        ("class Mine(Prior):\n    def __init__(self): ...\n", "plugin", r"add parts in build\(\)"),
        (
            "class Mine(Prior):\n    def build(self):\n        self.x = torch.zeros(2).tolist()\n"
            "        assert not torch.zeros(1).is_meta\n",
            "plugin",
            "failed with",
        ),
        (
            "class Mine(Prior):\n    def latent_term(self, *a):\n        return super().latent_term(*a).sum()\n",
            "plugin",
            r"latent_term must give finite nats a chunk \(b n\) = \(2, 5\), got \(\)",
        ),
    ],
)
def test_what_lacks_a_part_is_refused_by_name(source, key, says):
    name = own(source)
    with pytest.raises(ConfigError, match=says) as error:
        prior_class(PriorConfig(**{key: name}))
    assert f"prior.{key}={name}" in str(error.value)


def test_the_kernels_leave_own_parts_to_plain_torch_and_say_so(saved_pipeline):
    from hldm.config import GenerationConfig

    settings = GenerationConfig(steps=2)
    assert plain_steps(_small("", ""), settings) == {}
    lines = plain_steps(_small("", FILM), settings)
    assert set(lines) == {"denoise", "context"} and "the denoiser is a FilmDenoiser" in lines["denoise"]
    mine = own("class Mine(Prior): ...\n")
    assert "the prior is a Mine" in plain_steps(_small(mine, ""), settings)["context"]
