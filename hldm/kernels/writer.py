"""The writers of `hldm.generation.writer` with each step from chunk to chunk in one call of C++.

Which steps the kernels take is decided once, when a writer is made. The others stay in plain torch, and a line says
which setting costs that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hldm.config import GenerationConfig
from hldm.generation.chunk import Piece, Written
from hldm.generation.draft import Draft
from hldm.generation.finite import require_finite
from hldm.generation.writer import ByteWriter, LatentWriter, Stretch, Writer
from hldm.kernels.context import MOST_CHUNKS, KeptContext
from hldm.kernels.denoise import MOST_STEPS, PlannedSteps
from hldm.kernels.library import library
from hldm.kernels.structs import is_plain
from hldm.kernels.write import ALONE, Writing, write_bytes, write_chunks
from hldm.model.autoencoder import Autoencoder
from hldm.model.denoiser import Denoiser
from hldm.model.diffusion import draw_numbers
from hldm.model.prior import Prior

Step = Literal["denoise", "context"]

logger = logging.getLogger(__name__)


def make_writer(
    autoencoder: Autoencoder,
    prior: Prior | None,
    prompts: Sequence[bytes],
    settings: GenerationConfig,
    generators: Sequence[torch.Generator],
    draft: Draft | None = None,
) -> Writer:
    """`hldm.generation.writer.make_writer`; NotImplemented where there are no kernels for this device or model."""
    device = next(autoencoder.parameters()).device
    is_latent = autoencoder.latent_dim > 0
    if library() is None or device.type != "cpu" or not prompts or (is_latent and prior is None):
        return NotImplemented
    if reason := why_plain(autoencoder, prior):
        _say(f"{reason}: text is written in plain torch and takes about 20 times as long")
        return NotImplemented
    if prior is None:
        return FusedByteWriter(autoencoder, prompts, settings, generators, draft=draft)
    return FusedLatentWriter(autoencoder, prior, prompts, settings, generators, draft=draft)


def why_plain(autoencoder: Autoencoder, prior: Prior | None) -> str:
    """Why the kernels cannot write text of this model, in words; '' where they can."""
    if torch.is_grad_enabled():
        return "gradients are recorded (torch.no_grad() turns that off)"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    models = [autoencoder] if prior is None else [autoencoder, prior]
    parts = [part for model in models for part in model.modules()]
    if any(isinstance(part, nn.Dropout) and part.training and part.p for part in parts):
        return "dropout is on (eval() turns it off)"
    plain = all(is_plain(parameter) for model in models for parameter in model.parameters())
    return "" if plain else "weights are not all contiguous float32"


def plain_steps(prior: Prior, settings: GenerationConfig) -> dict[Step, str]:
    """The steps from chunk to chunk that stay in plain torch: why, in words, and what that costs.

    How much longer text takes: one continuation with the shapes of configs/small.yaml, measured.
    """
    found: dict[Step, str] = {}
    hierarchy, denoiser = prior.hierarchy, type(prior.denoiser)
    if not settings.steps:
        return found
    context = reason = "" if denoiser is Denoiser else f"the denoiser is a {denoiser.__name__}"
    if type(prior) is not Prior:  # a user's own, which may do anything otherwise
        context = reason = f"the prior is a {type(prior).__name__}"
    if settings.steps > MOST_STEPS:
        reason = f"generation.steps={settings.steps} is above {MOST_STEPS}"
    if prior.mixture is None:
        reason = "the prior corrects no mixture (autoencoder.components=0)"
    if settings.guidance != 1:
        reason = f"generation.guidance={settings.guidance:g}"
    if reason:
        longer = "2.5 times" if settings.guidance == 1 else "4 times"
        found["denoise"] = f"{reason}: latents are denoised in plain torch, text takes about {longer} as long"
    if hierarchy.ratio**hierarchy.levels > MOST_CHUNKS:
        context = f"hierarchy.ratio^levels is above {MOST_CHUNKS}"
    if context:
        found["context"] = f"{context}: contexts are made in plain torch, text takes about 3 times as long"
    return found


@cache
def _say(line: str) -> None:
    """Once a process."""
    logger.warning(line)


def _for_few(draft: Draft | None, rows: int) -> tuple[Draft | None, bool]:
    """The draft, if so many rows are written by one, and whether they are written one by one."""
    if draft is not None and rows > ALONE:
        _say(f"more than {ALONE} rows share a step, which a draft does not make faster: it is left out")
    return (draft if rows <= ALONE else None), rows <= ALONE


class FusedLatentWriter(LatentWriter):
    """The latent model, its chunks written and read back by the kernels; make one only where not `why_plain`."""

    write_chunks = staticmethod(write_chunks)

    def __init__(self, autoencoder: Autoencoder, prior: Prior, *arguments: Any, draft: Draft | None = None):
        """Arguments are those of `LatentWriter`;  draft: guesses symbols, where few rows are written."""
        super().__init__(autoencoder, prior, *arguments)
        draft, is_few = _for_few(draft, len(self.generators))
        # None: states are values, that `draw` and `pick` leave as they are
        self.writing: Writing | None = Writing(
            autoencoder, self.encoder, self.decoder, self.settings, alone=is_few, draft=draft
        )
        assert self.writing.encoder is not None
        self.encoder, self.decoder = self.writing.encoder, self.writing.decoder
        self.plain: Mapping[Step, str] = plain_steps(prior, self.settings)
        for line in self.plain.values():
            _say(line)
        self.planned: PlannedSteps | None = None  # None: plain, or no steps at all
        if self.plan is not None and "denoise" not in self.plain:
            self.planned = PlannedSteps(prior, self.plan)
        self.kept: KeptContext | None = None  # in place of `memory`; None: plain, or no steps at all
        if self.plan is not None and "context" not in self.plain:
            self.kept = KeptContext(prior, self.memory)

    def write(self, latents: Tensor | None = None) -> list[Piece]:
        if self.writing is None:
            return super().write(latents)
        z_0 = self.sample_latents() if latents is None else latents
        z_0 = require_finite(z_0, "latents", self.settings)
        pieces, read = self.writing.chunks(z_0, self.opens, self.generators)
        self.decoder = self.writing.decoder
        opens, self.opens = self.opens, [piece.ends_document for piece in pieces]
        if self.settings.steps:
            self.add_chunks(read, torch.tensor(opens)[:, None], torch.tensor(self.opens))
        return pieces

    def draw(self, latents: Tensor | None = None) -> Written:
        self.writing = None  # it would write over the states
        return super().draw(latents)

    def sample_latents(self) -> Tensor:
        if self.plan is None or self.planned is None:
            return super().sample_latents()
        rows = len(self.generators)
        self.calls += self.settings.steps
        shape, temperature = (rows, self.prior.latent_dim), self.settings.temperature
        uniform, noise = draw_numbers(self.plan, shape, self.generators, temperature, self.device)
        return self.planned.draw(self.conditioning, noise, uniform if self.draws_x0 else None, temperature)

    def pick(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> LatentWriter:
        other = super().pick(rows, generators)
        assert isinstance(other, FusedLatentWriter)
        other.writing = None
        if self.kept is not None:
            other.kept = self.kept.pick(torch.tensor(rows))
            if self.conditioning is self.kept.conditioning:
                other.conditioning = other.kept.conditioning
        return other

    def add_chunks(self, latents: Tensor, opens: Tensor, closed: Tensor) -> None:
        if self.kept is None:
            return super().add_chunks(latents, opens, closed)
        self.conditioning = self.kept.add(latents[:, 0], self.encoder.known, closed)


class FusedByteWriter(ByteWriter):
    """The twin, written by the kernels; make one only where not `why_plain`."""

    write_bytes = staticmethod(write_bytes)

    def __init__(self, autoencoder: Autoencoder, *arguments: Any, draft: Draft | None = None):
        """Arguments are those of `ByteWriter`;  draft: guesses symbols, where few rows are written."""
        super().__init__(autoencoder, *arguments)
        draft, is_few = _for_few(draft, len(self.generators))
        self.writing: Writing | None = Writing(  # None: as in `FusedLatentWriter`
            autoencoder, None, self.state, self.settings, alone=is_few, draft=draft, texts=arguments[0]
        )
        self.state = self.writing.decoder

    def write(self) -> list[Piece]:
        if self.writing is None:
            return super().write()
        pieces = self.writing.stretches(self.opens, self.generators)
        self.state = self.writing.decoder
        self.opens = [piece.ends_document for piece in pieces]
        return pieces

    def draw(self) -> Stretch:
        self.writing = None
        return super().draw()

    def pick(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> ByteWriter:
        other = super().pick(rows, generators)
        assert isinstance(other, FusedByteWriter)
        other.writing = None
        return other
