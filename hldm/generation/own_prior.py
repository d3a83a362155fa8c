"""Priors with parts of the user's own: found by their settings, and tried on a small model before they are used.

`prior.denoiser=module:Class` replaces the denoiser (hldm.model.own_denoiser), `prior.plugin=module:Class` names a
subclass of `Prior`. Either must keep what training, bound and writing rely on, which is tried here with random weights:
no answer depends on a later chunk or another draw, and a text read chunk by chunk gives what it gives as a whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from hldm import plugins
from hldm.config import ConfigError, DiffusionConfig, HierarchyConfig, PriorConfig, changed, to_dict
from hldm.model.own_denoiser import SETTING as DENOISER
from hldm.model.prior import Prior
from hldm.runs.saved_model import CONFIG, read_json
from hldm.sources.notes import note

PLUGIN = "prior.plugin"
ROWS, CHUNKS, DRAWS, LATENT, FEATURE = 2, 5, 2, 3, 6  # of the model that is tried
CLOSE = 1e-4  # float32, over two small layers


def prior_class(settings: PriorConfig) -> type[Prior]:
    """The class of the prior that these settings name, tried. Raises ConfigError, one line, for what it gets wrong."""
    cls = _class_named(settings.plugin)
    if settings.plugin or settings.denoiser:
        _try(settings.plugin, settings.denoiser)
    return cls


def code_of(settings: PriorConfig) -> str:
    """Fingerprints of the sources of a prior's own parts, "" where there are none."""
    named = ((PLUGIN, settings.plugin), (DENOISER, settings.denoiser))
    return "-".join(plugins.source_of(plugins.load(name, setting)) for setting, name in named if name)


def saved_class(folder: Path) -> list[str] | None:
    """Module and class of the user's own prior that was saved in a folder; None for ours, or for no prior."""
    name = _named_in(folder).get(PLUGIN, "")
    cls = _class_named(name)
    return [cls.__module__, cls.__name__] if name else None


def read_prior(folder: Path) -> Prior:
    """The prior that was saved in a folder, of whatever class; says where the source of its parts has changed since.

    Raises as `SavedModel.from_pretrained`, and ConfigError where it names code that may not run (hldm.plugins).
    """
    names = _named_in(folder)
    settings = PriorConfig(plugin=names.get(PLUGIN, ""), denoiser=names.get(DENOISER, ""))
    prior = prior_class(settings).from_pretrained(folder)
    if prior.config["code"] not in ("", code_of(settings)):
        note(
            f"{folder}: the source of {' and '.join(names.values())} has changed since this prior was trained"
        )
    return prior


def _named_in(folder: Path) -> dict[str, str]:
    path = folder / CONFIG
    return plugins.named_in(read_json(path)) if path.is_file() else {}


def _class_named(name: str) -> type[Prior]:
    if not name:
        return Prior
    cls = plugins.load(name, PLUGIN)
    where = f"{PLUGIN}={name}"
    if not issubclass(cls, Prior):
        raise ConfigError(f"{where} must be a subclass of hldm.model.prior.Prior")
    if inspect.signature(cls) != inspect.signature(Prior):
        raise ConfigError(
            f"{where} must keep __init__ of Prior: add parts in build(), which is called at its end"
        )
    return cls


@cache
def _try(plugin: str, denoiser: str) -> None:
    """Raise ConfigError unless a small prior with these parts, random weights in all of it, is one that can be used."""
    names = ((PLUGIN, plugin), (DENOISER, denoiser))
    where = " ".join(f"{setting}={name}" for setting, name in names if name)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for problem in plugins.called(
            f"{where}, tried on a small model,", lambda: [*_problems(plugin, denoiser)]
        ):
            raise ConfigError(f"{where}: {problem}")


def _small(plugin: str, denoiser: str) -> Prior:
    """A prior with these parts, of some hundred parameters."""
    size = PriorConfig(width=16, heads=2)
    sections = (
        changed(size, plugin=plugin, denoiser=denoiser),
        HierarchyConfig(levels=1, ratio=2, window=2),
        DiffusionConfig(),
    )
    return _class_named(plugin)(LATENT, *map(to_dict, sections), FEATURE, components=4, logit_cap=30.0)


def _problems(plugin: str, denoiser: str) -> Iterator[str]:
    """What is wrong, in words; the first is enough, and what comes after may rely on it."""
    prior = _small(plugin, denoiser).eval()
    for parameter in prior.parameters():  # nothing may hide behind zeros
        parameter.add_(0.1 * torch.randn_like(parameter))
    latents, features = torch.randn(ROWS, CHUNKS, LATENT), torch.randn(ROWS, CHUNKS, FEATURE)
    mask = torch.ones(ROWS, CHUNKS, dtype=torch.bool)
    doc_start = (torch.arange(CHUNKS) == 0).expand(ROWS, -1)
    z, gamma = torch.randn(ROWS, CHUNKS, DRAWS, LATENT), torch.randn(ROWS, CHUNKS, DRAWS)

    def answers(latents: Tensor, z: Tensor) -> Tensor:
        """x0_hat (b n m z)."""
        context, _ = prior.contextualiser(latents, mask, doc_start, prior.initial_state(ROWS), features)
        conditioning = prior.condition(context.first(CHUNKS))
        corrections.append(prior.denoiser(z, gamma, conditioning.blocks, z) if denoiser else z)
        return prior.denoise(z, gamma, conditioning)

    corrections: list[Tensor] = []
    whole = answers(latents, z)
    if corrections[0].shape != z.shape:  # which adding it to the mixture's estimate could hide
        yield f"forward must return (b n m z) = {tuple(z.shape)}, got {tuple(corrections[0].shape)}"
    if not isinstance(whole, Tensor) or whole.shape != z.shape:
        yield f"it must answer (b n m z) = {tuple(z.shape)}, got {tuple(getattr(whole, 'shape', ()))}"
    if not bool(whole.isfinite().all()):
        yield "it answers numbers that are not finite"
    if not torch.equal(answers(latents, z), whole):
        yield "it answers otherwise when asked again, in eval() mode: draw no numbers there, keep nothing"
    other = z.clone()
    other[0, 2, 0] += 1
    changed = (answers(latents, other) - whole).abs().amax(dim=-1) > CLOSE  # (b n m)
    changed[0, 2, 0] = False
    if bool(changed.any()):
        yield "what it answers for one noisy latent must depend on no other draw, chunk or document"
    later = latents.clone()
    later[:, 3:] += 1
    if bool(((answers(later, z) - whole)[:, :4].abs() > CLOSE).any()):
        yield "what it answers for a chunk must not depend on that chunk's latent or later ones (context.visible)"
    state, parts = prior.initial_state(ROWS), []
    for at in range(CHUNKS):
        part = slice(at, at + 1)
        read = latents[:, part], mask[:, part], doc_start[:, part], state, features[:, part]
        context, state = prior.contextualiser(*read)
        parts.append(prior.denoise(z[:, part], gamma[:, part], prior.condition(context.first(1))))
    if bool(((torch.cat(parts, dim=1) - whole).abs() > CLOSE).any()):
        yield "a text read chunk by chunk, as it is written, must give what it gives as a whole"
    with torch.enable_grad():
        context, _ = prior.contextualiser(latents, mask, doc_start, prior.initial_state(ROWS), features)
        uniform = torch.rand(ROWS, CHUNKS, DRAWS)
        nats = prior.latent_term(latents, mask, context.first(CHUNKS), uniform, torch.randn_like(z))
        if nats.shape != mask.shape or not bool(nats.isfinite().all()):
            yield f"latent_term must give finite nats a chunk (b n) = {tuple(mask.shape)}, got {tuple(nats.shape)}"
        nats.sum().backward()
    # `nothing` stands for a hidden context, and none is hidden here
    idle = [name for name, p in prior.named_parameters() if p.grad is None and name != "nothing"]
    if idle:
        yield f"its parameter {idle[0]} takes no part in what is trained: leave it out"
    with torch.device("meta"):  # where sizes are counted and saved models checked
        cast(Prior, _small(plugin, denoiser))
