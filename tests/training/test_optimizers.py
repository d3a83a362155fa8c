"""The learning-rate schedule, and the moving average: torch's, of what is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hldm.config import TrainingConfig
from hldm.training.optimizers import Average, learning_rate


def test_the_learning_rate_warms_up_then_follows_a_cosine():
    config = TrainingConfig(learning_rate=1.0, warmup=0.1, final_learning_rate=0.2)
    assert learning_rate(config, 0.0) == 0.0
    assert learning_rate(config, 0.05) == pytest.approx(0.5)
    assert learning_rate(config, 0.1) == pytest.approx(1.0)
    assert learning_rate(config, 0.55) == pytest.approx(0.6)
    assert learning_rate(config, 1.0) == pytest.approx(0.2)


def test_it_is_torchs_average_with_a_decay_that_warms_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)

    def lerp(averaged, current, count):
        torch._foreach_lerp_(averaged, current, 1 - min(0.3, (1 + int(count)) / (10 + int(count))))

    ours, torchs = Average(model, 0.3), AveragedModel(model, multi_avg_fn=lerp)
    for _ in range(8):
        with torch.no_grad():
            for parameter in (*model[0].parameters(), *model[1].parameters()):
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 3))  # moves the buffers
        ours.update_parameters(model)
        torchs.update_parameters(model)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for found, wanted in zip(ours.state_dict().values(), torchs.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted)
