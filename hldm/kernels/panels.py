"""Weights packed for one row's passes (hldm/kernels/cpp/stretch.h): PANEL outputs side by side, so that a pass reads
each number once, in order, and meets all of its positions with it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hldm.model.griffin import DECAY_POWER, RGLRU, Griffin

PANEL = 32  # of stretch.h


def panels_of(weight: Tensor) -> Tensor:
    """A matrix (out in) as (out / PANEL, in, PANEL), the last panel filled up with zeros."""
    filled = F.pad(weight.detach(), (0, 0, 0, -len(weight) % PANEL))
    return filled.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def packed_linear(module: nn.Linear) -> list[Tensor | None]:
    """Weight in panels, and bias."""
    return [panels_of(module.weight), None if module.bias is None else module.bias.detach()]


def packed_stack(model: Griffin) -> list[Tensor]:
    """A stack's parameters in the order of its modules, matrices in panels; log a_t = radius r in place of a_param."""
    found: list[Tensor] = []
    for module in model.modules():
        own: dict[str, Any] = dict(module.named_parameters(recurse=False))
        if isinstance(module, RGLRU):
            heads = [panels_of(head.mT) for head in own["gate_weight"]]
            radius = -DECAY_POWER * F.softplus(own["a_param"].detach())
            found += [torch.cat(heads), own["gate_bias"].detach(), radius]
        elif isinstance(module, nn.Linear):
            found += [part for part in packed_linear(module) if part is not None]
        else:
            found += [parameter.detach() for parameter in own.values()]
    return found
