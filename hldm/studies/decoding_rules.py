"""Rules of decoding that are no settings of hldm: contrast with a worse decoder, and denoising that stops early.

Each is a writer like `hldm.generation.writer.LatentWriter`, in plain torch; `hldm.studies.decoding` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from hldm.config import GenerationConfig
from hldm.generation.writer import ByteWriter, LatentWriter
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import alpha_sigma, draw_numbers
from hldm.model.likelihood import floored
from hldm.model.prior import Prior
from hldm.model.state import DecoderState, GriffinState, pick_rows, select_rows
from hldm.text.bytes import END_OF_CHUNK, START

PLAUSIBLE = 0.1  # of the likeliest byte's probability: the alpha of arXiv 2210.15097


def contrast(own: Tensor, other: Tensor, weight: float) -> Tensor:
    """Logits (b 258) after log p(byte) + weight (log p - log p') (Li et al., arXiv 2210.15097).

    Bytes less likely than PLAUSIBLE times the likeliest are barred. How likely an end of the chunk or the document is
    stays the model's own: a twin ends no chunk.
    """
    log_p = own.log_softmax(dim=-1)
    byte, before = (x[:, :END_OF_CHUNK].log_softmax(dim=-1) for x in (own, other))
    score = byte + weight * (byte - before)
    is_barred = byte < byte.amax(dim=-1, keepdim=True) + math.log(PLAUSIBLE)
    score = score.masked_fill(is_barred, -math.inf).log_softmax(dim=-1)
    mass = log_p[:, :END_OF_CHUNK].logsumexp(dim=-1, keepdim=True)
    return torch.cat([score + mass, log_p[:, END_OF_CHUNK:]], dim=-1)


class _Both(NamedTuple):
    """What a decoder and its rival carry from symbol to symbol."""

    own: GriffinState
    rival: GriffinState
    logits: (
        Tensor  # (b v) of the next byte, by a rival that reads whole documents; (b 0) for one that does not
    )


class _AgainstZeros:
    """An autoencoder that decodes against itself with a latent of zeros. All else is the autoencoder's own."""

    byte_floor = 0.0  # it is in the logits already

    def __init__(self, autoencoder: Autoencoder, weight: float):
        self.autoencoder, self.weight = autoencoder, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.autoencoder, name)

    def start(self, decoder: DecoderState) -> _Both:
        """What both carry before the first chunk."""
        return _Both(decoder.griffin, decoder.griffin, torch.zeros(len(decoder.symbol), 0))

    def decode_symbols(
        self,
        symbol: Tensor,
        doc_start: Tensor,
        unit_start: Tensor,
        both: _Both,
        *,
        latent: Tensor,
        **given: Any,
    ) -> tuple[Tensor, _Both]:
        """As `Autoencoder.decode_symbols`, one symbol a row."""
        logits, own = self.autoencoder.decode_symbols(
            symbol, doc_start, unit_start, both.own, latent=latent, **given
        )
        other, rival = self._rival(symbol, doc_start, unit_start, both, torch.zeros_like(latent), given)
        found = contrast(floored(logits[:, 0].float(), self.autoencoder.byte_floor), other, self.weight)
        return found[:, None], _Both(own, *rival)

    def _rival(
        self,
        symbol: Tensor,
        doc_start: Tensor,
        unit_start: Tensor,
        both: _Both,
        latent: Tensor,
        given: dict[str, Any],
    ) -> tuple[Tensor, tuple[GriffinState, Tensor]]:
        """The rival's logits (b v) of what comes next, and what it carries on."""
        logits, griffin = self.autoencoder.decode_symbols(
            symbol, doc_start, unit_start, both.rival, latent=latent, **given
        )
        return floored(logits[:, 0].float(), self.autoencoder.byte_floor), (griffin, both.logits)


class _AgainstTwin(_AgainstZeros):
    """The same against a twin, which reads every byte of the document and knows no chunks."""

    def __init__(self, autoencoder: Autoencoder, weight: float, twin: Autoencoder, prompts: Sequence[bytes]):
        super().__init__(autoencoder, weight)
        self.twin = twin
        reader = ByteWriter(twin, prompts, GenerationConfig(), [])
        opens = torch.tensor(reader.opens)
        symbol = torch.where(opens, START, reader.state.symbol)
        self.first = self._read(symbol[:, None], opens[:, None], reader.state.griffin)

    def start(self, decoder: DecoderState) -> _Both:
        """What both carry before the first chunk."""
        griffin, logits = self.first
        return _Both(decoder.griffin, griffin, logits)

    def _read(self, symbol: Tensor, opens: Tensor, griffin: GriffinState) -> tuple[GriffinState, Tensor]:
        """Read one more symbol (b 1) of every row. opens: (b 1) where a document starts."""
        logits, griffin = self.twin.decode_symbols(symbol, opens, opens, griffin)
        return griffin, floored(logits[:, 0].float(), self.twin.byte_floor)

    def _rival(
        self,
        symbol: Tensor,
        doc_start: Tensor,
        unit_start: Tensor,
        both: _Both,
        latent: Tensor,
        given: dict[str, Any],
    ) -> tuple[Tensor, tuple[GriffinState, Tensor]]:
        # at a chunk's start nothing new was written: the twin has read the last byte, unless a document starts
        opens = doc_start & unit_start
        reads = (~unit_start | opens)[:, 0]
        before = both.rival, both.logits
        if bool(reads.any()):
            before = select_rows(reads, self._read(symbol, opens, both.rival), before)
        return before[1], before


class ContrastingWriter(LatentWriter):
    """A writer whose bytes are drawn after `contrast` with a latent of zeros, or with a twin."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        prior: Prior,
        prompts: Sequence[bytes],
        settings: GenerationConfig,
        generators: Sequence[torch.Generator],
        weight: float,
        twin: Autoencoder | None = None,
    ):
        """twin: the rival; None: the same decoder with a latent of zeros."""
        super().__init__(autoencoder, prior, prompts, settings, generators)
        rival = (
            _AgainstZeros(autoencoder, weight)
            if twin is None
            else _AgainstTwin(autoencoder, weight, twin, prompts)
        )
        self.autoencoder = cast("Autoencoder", rival)
        self.decoder = DecoderState(cast("GriffinState", rival.start(self.decoder)), self.decoder.symbol)


class EarlyWriter(LatentWriter):
    """A writer that stops denoising a latent when its estimate moves by less than `threshold` in one step.

    The latent is then drawn around that estimate at gamma_0, as the last step would. Rows that are done leave the
    batch.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        prior: Prior,
        prompts: Sequence[bytes],
        settings: GenerationConfig,
        generators: Sequence[torch.Generator],
        threshold: float,
    ):
        """Raises ValueError, one line, where steps do not draw x0 as a mixture's do."""
        super().__init__(autoencoder, prior, prompts, settings, generators)
        if self.plan is None or not self.draws_x0 or self.blind is not None:
            raise ValueError(
                "denoising stops early with steps, a mixture, scheduler=ancestral and no guidance"
            )
        self.threshold = threshold

    def sample_latents(self) -> Tensor:
        """z_0 of the next chunk of every row (b z). `calls` counts rows, not batches."""
        plan, prior, gamma_0 = self.plan, self.prior, self.prior.diffusion.gamma_0
        assert plan is not None
        rows, temperature = len(self.generators), self.settings.temperature
        uniform, noise = draw_numbers(
            plan, (rows, prior.latent_dim), self.generators, temperature, self.device
        )
        alpha_0, sigma_0 = alpha_sigma(torch.tensor(gamma_0, device=self.device))
        found = torch.zeros_like(noise[0])
        live, conditioning, z, before = (
            torch.arange(rows, device=self.device),
            self.conditioning,
            noise[0],
            None,
        )
        for step, (gamma, weights) in enumerate(
            zip(plan.gammas[:-1].to(self.device), plan.weights.tolist(), strict=True)
        ):
            self.calls += len(live)
            level, fresh = gamma.expand(len(live)), noise[1 + step, live]
            x0 = prior.denoise(z[:, None, None], level[:, None, None], conditioning)[:, 0, 0]
            offset, variance = prior.spread(z, level, conditioning, uniform[step, live], temperature)
            found[live] = alpha_0 * (x0 + offset) + (sigma_0**2 + alpha_0**2 * variance).sqrt() * fresh
            deviation = (weights[3] ** 2 + weights[1] ** 2 * variance).sqrt()
            z = weights[0] * z + weights[1] * (x0 + offset) + deviation * fresh
            goes_on = torch.ones_like(live, dtype=torch.bool)
            if before is not None:
                goes_on = (x0 - before).abs().amax(dim=-1) >= self.threshold
                if not bool(goes_on.any()):
                    return found
            live, conditioning, z, before = pick_rows((live, conditioning, z, x0), goes_on)
        found[live] = z
        return found
