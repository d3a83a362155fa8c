"""Numbers that run away while writing end in one line that names the setting to lower, in every sampler."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny_model import tiny_pipeline

from hldm.config import GenerationConfig, changed
from hldm.generation.chunk import pick
from hldm.generation.finite import LARGEST, require_finite
from hldm.generation.writer import write_on


def settings(**unchecked) -> GenerationConfig:
    """Settings as they may come from elsewhere: not within the limits of GenerationConfig."""
    found = changed(GenerationConfig(steps=2))
    for name, value in unchecked.items():
        object.__setattr__(found, name, value)
    return found


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("scheduler", ["ancestral", "ddim", "dpm"])
@pytest.mark.parametrize(
    "extreme", [{"guidance": 1e20}, {"temperature": 1e30}, {"temperature": float("inf")}]
)
def test_latents_that_run_away_name_what_to_lower(extreme, scheduler, kernels, plain_torch):
    model, where = tiny_pipeline(), nullcontext() if kernels else plain_torch()
    with (
        where,
        pytest.raises(ValueError, match=r"latents are not finite.*lower generation.guidance") as error,
    ):
        for _ in write_on(
            model.autoencoder,
            model.prior,
            [b"And"],
            settings(scheduler=scheduler, **extreme),
            max_characters=20,
        ):
            pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(bad):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits of bytes are not finite"):
            pick(logits, torch.zeros(2), temperature, 1.0)
    logits[1, 3] = -float("inf")  # a symbol that is barred
    assert pick(logits, torch.full((2,), 0.99), 1.0, 1.0).tolist() == [4, 4]


def test_what_is_finite_passes():
    x = torch.tensor([[0.9 * LARGEST, -1.0]])
    assert require_finite(x, "x") is x
    for name in ("guidance", "temperature", "decoder_temperature"):
        GenerationConfig(**{name: 100.0})
