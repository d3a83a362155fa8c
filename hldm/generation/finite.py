"""Numbers that run away while writing end in one line that names the setting to lower."""

from __future__ import annotations

from torch import Tensor

from hldm.config import GenerationConfig

LARGEST = 1e6  # of a latent, whose unit is 1; beyond it float32 soon overflows in the decoder


def require_finite(x: Tensor, what: str, settings: GenerationConfig | None = None) -> Tensor:
    """x itself. Raises ValueError when any of it is not finite, or far beyond what a model can work with.

    settings: those that numbers were multiplied by; without them the weights alone are to blame
    """
    if bool((x.abs() < LARGEST).all()):
        return x
    if settings is None:
        way_out = "the model's weights are damaged or were trained to ruin: try another run"
    else:
        way_out = (
            f"lower generation.guidance ({settings.guidance:g} now) or generation.temperature "
            f"({settings.temperature:g}); if both are near 1, try another run"
        )
    raise ValueError(f"{what} are not finite, or far too large to write from: {way_out}")
