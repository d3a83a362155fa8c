"""All denoising steps of a batch of latents in a single call of C++: mixture, network and solver in turns.

What `hldm.diffusion.sample` does with `Prior.denoise`, to rounding, for a prior that corrects a mixture. What depends
on the noise level alone is worked out in torch for all steps at once. `hldm.generation` asks `can_denoise` first.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from hldm.diffusion import Steps, alpha_sigma
from hldm.kernels import library
from hldm.step import is_plain, kernels_can_compute

MOST_STEPS = 1000  # whose noise is drawn beforehand
_SIZES = ("rows", "steps", "z", "d", "width", "heads", "entries", "components", "hidden", "blocks", "threads")
_TENSORS = ("levels", "solver", "noise", "log_weights", "prototypes", "square")
_LAYERS = ("inputs", "inputs_bias", "outputs", "outputs_bias")
_LISTS = ("parameters", "told", "by_level")


class _Denoising(ctypes.Structure):
    """`Denoising` of hldm/cpp/denoise.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in (*_TENSORS, *_LAYERS, *_LISTS, "latent")),
    ]


def _layers(prior: Any) -> dict[str, Tensor]:
    """The denoiser's first and last layer, by their names in `_Denoising`."""
    first, last = prior.denoiser.inputs, prior.denoiser.outputs
    return dict(zip(_LAYERS, (first.weight, first.bias, last.weight, last.bias), strict=True))


def _parameters(prior: Any) -> list[Tensor]:
    """What every block of the denoiser does products with, in the order of hldm/cpp/denoise.cpp."""
    return [
        parameter
        for block in prior.denoiser.blocks
        for linear in (block.query, block.attended, block.mlp[0], block.mlp[2])
        for parameter in (linear.weight, linear.bias)
    ]


def can_denoise(prior: Any, told: Any, plan: Steps) -> bool:
    """Whether `denoise_steps` does what `sample` would with `Prior.denoise`, told of the context as `tell` does."""
    if not kernels_can_compute() or prior.mixture is None or len(plan.weights) > MOST_STEPS:
        return False
    if told.log_weights.shape[0] == 0 or (prior.training and prior.settings.dropout):
        return False
    parameters = [*_layers(prior).values(), *_parameters(prior), prior.mixture.prototypes]
    return all(map(is_plain, parameters))


def denoise_steps(prior: Any, told: Any, plan: Steps, latent: Tensor, noise: Tensor) -> Tensor:
    """z_0 (b z) after all steps of a plan, from noise (b z); call only where `can_denoise`.

    told: `Prior.tell` of one context a row;  noise: (steps b z), or (0 b z) where steps add none
    """
    kernels, (rows, z), steps = library(), latent.shape, len(plan.weights)
    assert kernels is not None and len(noise) in (0, steps)
    denoiser, mixture, gammas = prior.denoiser, prior.mixture, plan.gammas[:-1]
    time = denoiser.by_level(gammas)
    tensors = {
        "levels": torch.stack(alpha_sigma(gammas), dim=1),
        "solver": plan.weights,
        "noise": noise if len(noise) else latent.new_zeros(steps, rows, z),
        "log_weights": told.log_weights,
        "prototypes": mixture.prototypes,
        "square": (2 * mixture.log_deviation).exp(),
        **_layers(prior),
        "latent": latent.clone(memory_format=torch.contiguous_format),
    }
    lists = {
        "parameters": _parameters(prior),
        "told": [part for block in told.blocks for part in block],
        "by_level": [block.from_gamma(time) for block in denoiser.blocks],
    }
    tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    lists = {name: [part.float().contiguous() for part in parts] for name, parts in lists.items()}
    pointers = {
        name: (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts))
        for name, parts in lists.items()
    }
    call = _Denoising(
        rows=rows,
        steps=steps,
        z=z,
        d=denoiser.inputs.out_features,
        width=prior.settings.width,
        heads=prior.settings.heads,
        entries=told.blocks[0].key.shape[2] if told.blocks else 0,
        components=len(mixture.prototypes),
        hidden=denoiser.blocks[0].mlp[0].out_features if told.blocks else 0,
        blocks=len(told.blocks),
        threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        **{name: ctypes.addressof(array) for name, array in pointers.items()},
    )
    kernels.hldm_denoise(ctypes.byref(call))
    return tensors["latent"]
