"""The table of faster forms that `hldm.model.speed` looks up: a plain function or class, and what does the same faster.

A form of a function takes the arguments of the plain one and may return NotImplemented: then the plain one runs. What
gains less than 2 % of a training step or of writing has no form (measured, configs/small.yaml, one core).
"""

from __future__ import annotations

from typing import Any

import torch

from hldm.generation import writer as generation
from hldm.kernels import derivatives, library, muon, scan, writer
from hldm.model import ops

FORMS: dict[Any, Any] = {
    ops.scan: scan.scan,
    ops.rg_lru: derivatives.rg_lru,
    ops.causal_conv: derivatives.causal_conv,
    ops.rms_norm: derivatives.rms_norm,
    ops.add_rms_norm: derivatives.add_rms_norm,
    ops.gelu_gate: derivatives.gelu_gate,
    generation.make_writer: writer.make_writer,
    torch.optim.Muon: muon.Muon,
}


def why_none() -> str:
    """Why there are no C++ kernels, in words; "" where there are."""
    found = library.kernels()
    return "" if found.library else found.told
