"""The learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hldm.config import TrainingConfig
from hldm.training.optimizers import (
    FINAL_LEARNING_RATE,
    WARMUP,
    learning_rate,
    make_average,
    weight_decay,
)


def test_the_learning_rate_warms_up_then_follows_a_cosine():
    config = TrainingConfig(learning_rate=1.0)
    assert learning_rate(config, 0.0) == 0.0
    assert learning_rate(config, WARMUP / 2) == pytest.approx(0.5)
    assert learning_rate(config, WARMUP) == pytest.approx(1.0)
    assert learning_rate(config, (1 + WARMUP) / 2) == pytest.approx((1 + FINAL_LEARNING_RATE) / 2)
    assert learning_rate(config, 1.0) == pytest.approx(FINAL_LEARNING_RATE)


def test_weight_decay_stays_or_grows_by_a_cosine():
    config = TrainingConfig(weight_decay=0.04)
    assert all(weight_decay(config, 1.0, progress) == 0.04 for progress in (0.0, 0.3, 1.0))
    grown = [weight_decay(config, 10.0, progress) for progress in (0.0, 0.5, 1.0, 1.2)]
    assert grown == pytest.approx([0.04, 0.22, 0.4, 0.4])


def test_the_averages_decay_warms_up_and_frozen_weights_and_buffers_stay_the_models():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    average, wanted = make_average(model, 0.3), torch.zeros(4, 3)
    for n in range(8):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(4, 3))
        model(torch.randn(5, 3))  # moves the buffers
        average.update_parameters(model)
        wanted = wanted.lerp(model[0].weight, 1 - min(0.3, (1 + n) / (10 + n)) if n else 1.0)
    torch.testing.assert_close(average.module[0].weight, wanted)
    same = {name: value for name, value in model.state_dict().items() if name != "0.weight"}
    found = {name: average.module.state_dict()[name] for name in same}
    torch.testing.assert_close(found, same, rtol=0, atol=0)
