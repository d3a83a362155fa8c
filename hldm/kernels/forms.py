"""The table of faster forms that `hldm.model.speed` looks up: a plain function or class, and what does the same faster.

A form of a function takes the arguments of the plain one and may return NotImplemented: then the plain one runs.
"""

from __future__ import annotations

from typing import Any

import torch

from hldm.kernels import muon

FORMS: dict[Any, Any] = {
    torch.optim.Muon: muon.Muon,
}
