"""Optimizers, their learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hldm.config import TrainingConfig
from hldm.model.speed import fastest

# Not swept: customary values, with which all figures of docs/results.md were measured.
WARMUP = 0.05  # share of the progress spent warming up
FINAL_LEARNING_RATE = 0.05  # at the end, as a share of the peak
CLIP_NORM = 1.0  # of all gradients together


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """Linear over the first WARMUP of the progress in [0, 1], then a cosine down to FINAL_LEARNING_RATE of the peak."""
    if progress < WARMUP:
        return config.learning_rate * progress / WARMUP
    done = min(1.0, (progress - WARMUP) / (1 - WARMUP))
    final = FINAL_LEARNING_RATE
    return config.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


def weight_decay(config: TrainingConfig, growth: float, progress: float) -> float:
    """A cosine from config.weight_decay at progress 0 to `growth` times that at 1, as in I-JEPA and V-JEPA."""
    done = (1 - math.cos(math.pi * min(progress, 1.0))) / 2
    return config.weight_decay * (1 + (growth - 1) * done)


def set_rates(
    optimizers: list[torch.optim.Optimizer], config: TrainingConfig, growth: float, progress: float
) -> float:
    """Give optimizers the learning rate, which is returned, and the weight decay of this progress."""
    rate = learning_rate(config, progress)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
            if group["weight_decay"]:  # not of biases, gains and embeddings
                group["weight_decay"] = weight_decay(config, growth, progress)
    return rate


def make_optimizers(model: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon (Jordan et al. 2024) for 2-D weights but embeddings, 32 wide or more, AdamW for the rest."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []  # what multiplies; not biases, gains and embeddings
    kept: list[nn.Parameter] = []
    for p in (p for p in model.parameters() if p.requires_grad):
        if p.ndim < 2 or id(p) in embeddings:
            kept.append(p)
        elif config.optimizer == "muon" and p.ndim == 2 and min(p.shape) >= 32:
            matrices.append(p)
        else:
            decayed.append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    # beta_2 below torch's 0.999: a run of some hundred steps would hardly warm that average up. Not swept.
    adamw = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, 0.97), fused=True
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        optimizers.append(
            fastest(torch.optim.Muon)(
                matrices,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                # the update's RMS is AdamW's, so that both share one learning rate (arXiv 2502.16982)
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights, folded in n times; its decay warms up as (1 + n) / (10 + n)."""

    def fold(averages: Any, weights: Any, n: Any) -> None:
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + int(n)) / (10 + int(n))))

    return AveragedModel(model, multi_avg_fn=fold)
