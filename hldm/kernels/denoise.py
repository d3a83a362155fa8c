"""All denoising steps of a batch of latents in a single call of C++: mixture, network and solver in turns.

What `hldm.model.diffusion.sample` does with `Prior.denoise`, to rounding, for a prior that corrects a mixture. What
depends on the noise level alone is worked out in torch, once for a text: weights do not change while it is written.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from hldm.kernels.library import library
from hldm.kernels.stack import is_plain, kernels_can_compute
from hldm.model.denoiser import Told
from hldm.model.diffusion import Steps, alpha_sigma
from hldm.model.prior import Prior

MOST_STEPS = 1000  # whose noise is drawn beforehand
_SIZES = ("rows", "steps", "z", "d", "width", "heads", "entries", "components", "hidden", "blocks", "threads")
_TENSORS = ("levels", "solver", "noise", "log_weights", "prototypes", "square")
_LAYERS = ("inputs", "inputs_bias", "outputs", "outputs_bias")
_LISTS = ("parameters", "told", "by_level")


class _Denoising(ctypes.Structure):
    """`Denoising` of hldm/kernels/cpp/denoise.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in (*_TENSORS, *_LAYERS, *_LISTS, "latent")),
    ]


def _layers(prior: Any) -> dict[str, Tensor]:
    """The denoiser's first and last layer, by their names in `_Denoising`."""
    first, last = prior.denoiser.inputs, prior.denoiser.outputs
    return dict(zip(_LAYERS, (first.weight, first.bias, last.weight, last.bias), strict=True))


def _parameters(prior: Any) -> list[Tensor]:
    """What every block of the denoiser does products with, in the order of hldm/kernels/cpp/denoise.cpp."""
    return [
        parameter
        for block in prior.denoiser.blocks
        for linear in (block.query, block.attended, block.mlp[0], block.mlp[2])
        for parameter in (linear.weight, linear.bias)
    ]


def can_denoise(prior: Prior, steps: int) -> bool:
    """Whether `PlannedSteps` does what so many steps of `sample` would with `Prior.denoise`."""
    if not kernels_can_compute() or prior.mixture is None or steps > MOST_STEPS:
        return False
    if prior.training and prior.settings.dropout:
        return False
    parameters = [*_layers(prior).values(), *_parameters(prior), prior.mixture.prototypes]
    return all(map(is_plain, parameters))


class PlannedSteps:
    """A plan's steps, with all worked out that is the same for every latent; make one only where `can_denoise`."""

    def __init__(self, prior: Prior, plan: Steps):
        kernels, mixture = library(), prior.mixture
        denoiser: Any = prior.denoiser  # Any: modules in lists have no type of their own
        assert kernels is not None and mixture is not None
        self._run, self._steps = kernels.hldm_denoise, len(plan.weights)
        gammas = plan.gammas[:-1]
        time = denoiser.by_level(gammas)
        self._tensors = {
            "levels": torch.stack(alpha_sigma(gammas), dim=1).contiguous(),
            "solver": plan.weights.contiguous(),
            "prototypes": mixture.prototypes,
            "square": (2 * mixture.log_deviation).exp(),
            **_layers(prior),
        }
        self._lists = {
            "parameters": _parameters(prior),
            "by_level": [block.from_gamma(time) for block in denoiser.blocks],
        }
        self._pointers = {name: _pointers(parts) for name, parts in self._lists.items()}
        self._call = _Denoising(
            steps=self._steps,
            z=prior.latent_dim,
            d=denoiser.inputs.out_features,
            width=prior.settings.width,
            heads=prior.settings.heads,
            components=len(mixture.prototypes),
            hidden=denoiser.blocks[0].mlp[0].out_features,
            blocks=len(denoiser.blocks),
            **{name: tensor.data_ptr() for name, tensor in self._tensors.items()},
            **{name: ctypes.addressof(array) for name, array in self._pointers.items()},
        )

    def draw(self, told: Told, latent: Tensor, noise: Tensor) -> Tensor:
        """z_0 (b z) after all steps, from noise (b z).

        told: `Prior.tell` of one context a row;  noise: (steps b z), or (0 b z) where steps add none
        """
        call, rows = self._call, len(latent)
        assert latent.shape == (rows, call.z) and len(noise) in (0, self._steps)
        noise = noise if len(noise) else latent.new_zeros(self._steps, rows, call.z)
        latent, noise = latent.clone(memory_format=torch.contiguous_format), noise.contiguous()
        assert told.log_weights is not None
        log_weights = told.log_weights.float().contiguous()
        parts = [part.float().contiguous() for block in told.blocks for part in block]
        pointers = _pointers(parts)
        call.rows, call.entries, call.threads = rows, told.blocks[0].key.shape[2], torch.get_num_threads()
        call.latent, call.noise, call.log_weights = (
            latent.data_ptr(),
            noise.data_ptr(),
            log_weights.data_ptr(),
        )
        call.told = ctypes.addressof(pointers)
        self._run(ctypes.byref(call))
        return latent


def _pointers(tensors: list[Tensor]) -> Any:
    assert all(map(is_plain, tensors))
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
