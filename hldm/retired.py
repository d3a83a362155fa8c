"""Settings of earlier versions that are gone: what a saved model or a file may still say, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hldm.settings import COMMAND_LINE, ConfigError, Setting

# Forms that were removed, each with the values that say what is left; none: any does, since without the form it
# belonged to it says nothing. A saved model or a file that says this much loads as before.
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
    "diffusion.target": ("v",),
    "prior.contextualiser": ("transformer",),
    "prior.one_step": ("none",),
    "prior.energy": (),
    "prior.self_conditioning": ("0", "0.0"),
    "training.autoencoder.joint": ("0", "0.0"),
    "training.prior.joint": ("0", "0.0"),
}
# of settings that stay
RETIRED_VALUES = {"generation.scheduler": ("energy", "flow")}


class Constant(NamedTuple):
    """A setting that is a constant now."""

    values: tuple[str, ...]  # that say what is left
    now: str  # what became of it
    trains: bool = (
        True  # whether training alone depends on it: what was trained with another value is read as it is
    )


_OF_A_SEGMENTER = "a constant of hldm/chunking/segmenter.py"
_OF_TRAINING = "a constant of hldm/training/optimizers.py"

# By the end of the key, so that a section is understood wherever it stands.
CONSTANTS: Mapping[str, Constant] = {
    "conv_width": Constant(("4",), "4 taps", trains=False),
    "dropout": Constant(("0", "0.0"), "0: nothing is dropped out"),
    "mlp_ratio": Constant(("2", "2.0"), "2, but for autoencoder.decoder.mlp_ratio", trains=False),
    "autoencoder.rate_anneal": Constant(("0.5",), "0.5"),
    "diffusion.gamma_1": Constant(("5", "5.0"), "5", trains=False),
    "prior.denoiser_width": Constant((), "the width of the whole prior, prior.width", trains=False),
    "prior.draws": Constant(("4",), "4"),
    "prior.context_dropout": Constant(("0.1",), "0.1"),
    "data.shuffle_bytes": Constant(("16777216",), "16 MiB a reader"),
    "logging.validate_every": Constant(("250",), "250 steps"),
    "logging.validation_bytes": Constant(("8192",), "8,192 bytes"),
    "chunking.segmenter.width": Constant(("64",), _OF_A_SEGMENTER, trains=False),
    "chunking.segmenter.layers": Constant(("2",), _OF_A_SEGMENTER, trains=False),
    "chunking.segmenter.lanes": Constant(("16",), _OF_A_SEGMENTER),
    "chunking.segmenter.window_bytes": Constant(("256",), _OF_A_SEGMENTER),
    "chunking.segmenter.steps": Constant(("2000",), _OF_A_SEGMENTER),
    "chunking.segmenter.minutes": Constant(("1", "1.0"), f"{_OF_A_SEGMENTER}, a strategy's own"),
    "chunking.segmenter.learning_rate": Constant(("0.004", "4e-3", "4.0e-3"), _OF_A_SEGMENTER),
    "chunking.segmenter.sample_bytes": Constant(("65536",), _OF_A_SEGMENTER),
}
# Of each stage's training: training.prior.warmup.
OF_A_STAGE: Mapping[str, Constant] = {
    "optimizer": Constant(("muon",), "muon (adamw in hldm jepa)"),
    "weight_decay": Constant(("0.01",), _OF_TRAINING),
    "warmup": Constant(("0.05",), _OF_TRAINING),
    "final_learning_rate": Constant(("0.05",), _OF_TRAINING),
    "clip_norm": Constant(("1", "1.0"), _OF_TRAINING),
    "timeout_s": Constant(("300", "300.0"), "a constant of hldm/training/stage.py"),
    "gradient_checkpointing": Constant(("false", "False"), "training.gradient_checkpointing, of stage one"),
}


def without_retired(
    settings: Mapping[str, Setting], known: Mapping[str, Any], section: str = "", is_saved: bool = False
) -> dict[str, Setting]:
    """Settings by dotted key, those of earlier versions taken out, or put where they are now.

    known: the settings that there are, with their defaults
    section: what stands before the keys in a message, such as `prior.`
    is_saved: of what is trained: a value that mattered to its training alone is no fault
    Raises ConfigError, one line, for one that says something else than what is left, and for any on a command line.
    """
    kept: dict[str, Setting] = {}
    moved: dict[str, dict[str, Setting]] = {}  # settings of all stages, as each of them had its own
    for key, setting in settings.items():
        full = f"{section}{key}"
        if key in known or not (place := _place(full, known) or _constant(full) or _form(full)):
            _check_value(full, setting)
            kept[key] = setting
        elif isinstance(place, Constant):
            _check_constant(full, setting, place, _same_as(key, settings, known), is_saved)
        elif place in known:
            if setting.where == COMMAND_LINE:
                raise ConfigError(f"{COMMAND_LINE}: {full} is {place} now, of every stage: set that")
            moved.setdefault(place, {})[key] = setting
        else:
            _check_form(full, setting, RETIRED[place])
    for place, found in moved.items():
        if place not in kept:
            kept[place] = _agreed(place, found, is_saved)
    return kept


def _place(key: str, known: Mapping[str, Any]) -> str:
    """Where a stage's own setting is now, if all stages share it: training.clock of training.prior.clock; else ""."""
    parts = key.split(".")
    if len(parts) != 3 or parts[0] != "training" or (place := f"training.{parts[2]}") not in known:
        return ""
    return "" if parts[1:] == ["prior", "gradient_checkpointing"] else place  # which had to be false


def _constant(key: str) -> Constant | None:
    parts = key.split(".")
    if len(parts) == 3 and parts[0] == "training" and parts[2] in OF_A_STAGE:
        found = OF_A_STAGE[parts[2]]
        is_jepas = parts[1] in ("jepa", "decoder") and parts[2] == "optimizer"
        return found._replace(values=("adamw",)) if is_jepas else found
    return next((found for end, found in CONSTANTS.items() if f".{key}".endswith(f".{end}")), None)


def _form(key: str) -> str:
    return next((old for old in RETIRED if f"{key}.".startswith(f"{old}.")), "")


def _same_as(key: str, settings: Mapping[str, Setting], known: Mapping[str, Any]) -> str:
    """What prior.denoiser_width must be equal to."""
    width = key.replace("denoiser_width", "width")
    return str(settings[width].value if width in settings else known.get(width))


def _check_constant(key: str, setting: Setting, constant: Constant, same: str, is_saved: bool) -> None:
    says = str(setting.value)
    is_left = says in (constant.values or (same,))
    if setting.where == COMMAND_LINE or not (is_left or (is_saved and constant.trains)):
        undone = "leave it out"
        if not is_left and not constant.trains:
            undone += ", or use the version of hldm that trained with it"
        raise ConfigError(
            f"{setting.where}: {key}={says[:100]} is no setting any more, it is {constant.now}: {undone}"
        )


def _check_form(key: str, setting: Setting, left: tuple[str, ...]) -> None:
    if left and str(setting.value) not in left:
        _refuse(key, setting)


def _check_value(key: str, setting: Setting) -> None:
    if setting.value in RETIRED_VALUES.get(key, ()):
        _refuse(key, setting)


def _refuse(key: str, setting: Setting) -> None:
    raise ConfigError(
        f"{setting.where}: {key}={str(setting.value)[:100]} is a form that was removed: choose another or, for what "
        "was trained with it, use the version of hldm that trained it or train again"
    )


def _agreed(place: str, found: Mapping[str, Setting], is_saved: bool) -> Setting:
    """What the stages say of a setting that they share now; of what is trained, the first of them is believed."""
    first, *others = found.values()
    if is_saved or place == "training.gradient_checkpointing":
        return first
    if others and all(str(other.value) == str(first.value) for other in others):
        return first
    raise ConfigError(f"{first.where}: {next(iter(found))} is {place} now, of every stage: set that")
