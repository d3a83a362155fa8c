"""Settings of earlier versions that are gone: which of them a saved model or a file may still say."""

from __future__ import annotations

from collections.abc import Mapping

from hldm.settings import ConfigError

# Settings of earlier versions that are gone, each with the values that say what is left; none: any does, since without
# the form it belonged to it says nothing. A saved model or a file that says this much loads as before.
RETIRED: Mapping[str, tuple[str, ...]] = {
    "autoencoder.writes": ("bytes",),
    "autoencoder.rate": ("mixture",),
    "autoencoder.byte_dropout": ("0", "0.0"),
    "autoencoder.latent_dropout": ("0", "0.0"),
    "autoencoder.clean_latents": ("0", "0.0"),
    "chunking.entropy_form": ("threshold",),
    "chunking.gate_form": ("first",),
    "chunking.learned_form": ("forget",),
    "chunking.select_form": ("last",),
    "data.cache_latents": ("false", "False"),
    "diffusion.schedule": ("learned",),
    "prior.contextualiser": ("transformer",),
    "prior.one_step": ("none",),
    "prior.energy": (),
    "prior.self_conditioning": ("0", "0.0"),
    "training.autoencoder.joint": ("0", "0.0"),
    "training.prior.joint": ("0", "0.0"),
}
# of settings that stay
RETIRED_VALUES = {"diffusion.target": ("eps",), "generation.scheduler": ("energy", "flow")}


def is_retired(key: str, value: object, where: str = "") -> bool:
    """Whether this is a setting of RETIRED. Raises ConfigError where it says another form than what is left.

    value: as it was written, or what was read of it; where: what an error opens with
    """
    old = next((old for old in RETIRED if f"{key}.".startswith(f"{old}.")), "")
    left = RETIRED.get(old, ())
    if (left and str(value) not in left) or value in RETIRED_VALUES.get(key, ()):
        raise ConfigError(
            f"{where}{key}={str(value)[:100]} is a form that was removed: choose another or, for what was trained "
            "with it, use the version of hldm that trained it or train again"
        )
    return bool(old)
