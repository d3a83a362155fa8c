"""Prompt -> text, a chunk at a time, nothing computed twice.

    context --sample--> z_0 of the next chunk --decode until it ends--> bytes --encode--> latent --> context

Encoder, pyramid and (if carried) decoder keep their state, so a character costs the same however long
the text. Each row draws from its own generator: a batch of prompts writes what they write one by one.
The twin writes byte by byte behind the same interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hldm.config import Config, GenerationConfig
from hldm.generation.chunk import Piece, Written, write_bytes, write_chunks
from hldm.generation.finite import require_finite
from hldm.kernels.context import KeptContext, can_keep
from hldm.kernels.denoise import PlannedSteps, can_denoise
from hldm.model.autoencoder import Autoencoder, DecoderState, EncoderState
from hldm.model.contextualiser import Context, ContextState
from hldm.model.denoiser import Told
from hldm.model.diffusion import draw_noise, sample, sampler_steps
from hldm.model.mixture import draw_rows
from hldm.model.prior import Prior
from hldm.model.state import select_rows
from hldm.text.bytes import count_characters, split_incomplete, to_ids
from hldm.training.sizes import PROMPT_WINDOW, require_room_to_write


class Writer(Protocol):
    """Writes on from prompts; `write` gives one piece a row and remembers where it is."""

    calls: int  # denoiser evaluations so far

    def write(self) -> list[Piece]: ...


@dataclass
class Continuation:
    """What was written after one prompt."""

    prompt: bytes
    chunks: list[bytes] = field(default_factory=list)
    ended: bool = False  # the model closed the document

    @property
    def text(self) -> bytes:
        """The chunks in one."""
        return b"".join(self.chunks)


def row_generators(seed: int, rows: int) -> list[torch.Generator]:
    """One generator a row: row i of seed s is row 0 of seed s + i."""
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]


class _Window(NamedTuple):
    """Bytes of several rows, padded, with their flags."""

    text: Tensor
    length: Tensor
    doc_start: Tensor
    chunk_start: Tensor
    chunks: int | None = None  # a row, padded; None: the most in any


def _window(
    pieces: Sequence[bytes],
    starts: Sequence[np.ndarray],
    opens: Sequence[bool],
    device: torch.device,
    width: int | None = None,
) -> _Window:
    """width: pad to so many bytes a row (those of the longest when None)."""
    width = max((len(piece) for piece in pieces), default=0) if width is None else width
    text = np.zeros((len(pieces), width), dtype=np.int64)
    chunk_start = np.zeros(text.shape, dtype=bool)
    doc_start = np.zeros(text.shape, dtype=bool)
    for row, (piece, start, opening) in enumerate(zip(pieces, starts, opens, strict=True)):
        text[row, : len(piece)] = to_ids(piece)
        chunk_start[row, : len(piece)] = start
        if opening and piece:
            doc_start[row, 0] = True
    return _Window(
        torch.from_numpy(text).to(device),
        torch.tensor([len(piece) for piece in pieces]).to(device),
        torch.from_numpy(doc_start).to(device),
        torch.from_numpy(chunk_start).to(device),
    )


def _prompt_windows(
    prompts: Sequence[bytes], starts: Sequence[np.ndarray], device: torch.device
) -> Iterator[_Window]:
    """Cut prompts at chunk borders into windows of about PROMPT_WINDOW bytes in all; short ones run out early.

    All have one shape, so that the memory which one gives back fits the next. Tensors of ever other sizes leave
    glibc's heap in pieces, the more of them the longer the text.
    """
    size = max(PROMPT_WINDOW // max(len(prompts), 1), 1)
    cuts, width, chunks = [], 0, 0
    for prompt, start in zip(prompts, starts, strict=True):
        borders = np.append(np.flatnonzero(start), len(prompt))
        wanted = np.arange(0, len(prompt) + size, size)
        at = np.unique(np.searchsorted(borders, wanted).clip(max=len(borders) - 1))
        cuts.append(borders[at])
        width = max(width, *np.diff(borders[at]).tolist(), 0)
        chunks = max(chunks, *np.diff(at).tolist(), 0)
    for index in range(max((len(cut) for cut in cuts), default=1) - 1):
        pieces, flags = [], []
        for prompt, start, cut in zip(prompts, starts, cuts, strict=True):
            part = slice(cut[index], cut[index + 1]) if index + 1 < len(cut) else slice(0, 0)
            pieces.append(prompt[part])
            flags.append(start[part])
        yield _window(pieces, flags, [index == 0] * len(prompts), device, width)._replace(chunks=chunks)


class LatentWriter:
    """The latent model: samples a latent, writes its chunk, reads it back."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        prior: Prior,
        prompts: Sequence[bytes],
        settings: GenerationConfig,
        generators: Sequence[torch.Generator],
    ):
        self.autoencoder, self.prior, self.settings = autoencoder, prior, settings
        self.generators = generators
        self.device = next(autoencoder.parameters()).device
        self.calls = 0
        self.plan = None
        self.planned: PlannedSteps | None = None
        if settings.is_one_step:
            prior.require_one_step()
        elif settings.steps:
            self.plan = sampler_steps(settings.solver, prior.schedule, settings.steps)
        rows = len(prompts)
        self.encoder: EncoderState = autoencoder.encoder_state(rows, self.device)
        self.decoder: DecoderState = autoencoder.decoder_state(rows, self.device)
        self.memory: ContextState | KeptContext = prior.initial_state(rows, self.device)
        self.context: Context | Told = self._read_nothing(self.memory)  # of the next chunk
        self.opens = [True] * rows  # whether the next chunk is the first of its document
        starts = [autoencoder.chunker.chunk_start(prompt) for prompt in prompts]
        for window in _prompt_windows(prompts, starts, self.device):
            self._read(window)
        self.opens = [not prompt for prompt in prompts]

    def _read_nothing(self, memory: ContextState) -> Context:
        rows = memory.written.shape[0]
        none = torch.zeros(rows, 0, dtype=torch.bool, device=self.device)
        latents = torch.zeros(rows, 0, self.prior.latent_dim, device=self.device)
        context, _ = self.prior.contextualiser(latents, none, none, memory)
        return context.first(1)

    def _read(self, window: _Window) -> None:
        """Take in whole chunks of a prompt: advance encoder, pyramid and a carried decoder."""
        text, length, doc_start, chunk_start, chunks = window
        encoding, self.encoder = self.autoencoder.encode(
            text, length, doc_start, chunk_start, self.encoder, chunks
        )
        self._remember(encoding.latents, encoding.mask, encoding.doc_start, encoding.after)
        if self.autoencoder.settings.carry_state:
            never = torch.zeros_like(doc_start)
            events = self.autoencoder.events(text, length, doc_start, never, chunk_start, self.decoder)
            # the mean of what the decoder was trained on
            gamma_0 = torch.tensor(self.prior.diffusion.gamma_0, device=self.device)
            _, griffin = self.autoencoder.decode(
                events.symbol,
                encoding.latents * torch.sigmoid(-gamma_0).sqrt(),
                events.chunk,
                events.doc_start,
                events.unit_start,
                self.decoder.griffin,
                events.length,
                told=self.autoencoder.tell(events, encoding),
            )
            self.decoder = DecoderState(griffin, events.last)

    def _read_own(self, written: Written) -> None:
        """Take in the chunks just written, from where their writing left the models."""
        pieces = written.pieces
        closed = torch.tensor([piece.ends_document for piece in pieces], device=self.device)
        if written.features is None:
            starts = [np.arange(len(piece.text)) == 0 for piece in pieces]
            window = _window([piece.text for piece in pieces], starts, self.opens, self.device)
            encoding, self.encoder = self.autoencoder.encode(*window[:4], self.encoder)
            self._remember_own(encoding.latents, encoding.doc_start, encoding.after, closed)
        else:
            length = torch.tensor([len(piece.text) for piece in pieces], device=self.device)
            opens = torch.tensor(self.opens, device=self.device)[:, None]
            features = written.features
            latents, self.encoder = self.autoencoder.close_chunk(
                features, written.encoder, length, opens, self.encoder
            )
            self._remember_own(latents, opens, self.encoder.known[:, None], closed)
        last = torch.tensor([piece.text[-1] for piece in pieces], device=self.device)
        self.decoder = DecoderState(written.decoder, last)

    def _remember(self, latents: Tensor, mask: Tensor, doc_start: Tensor, after: Tensor) -> None:
        """The context of the next chunk, from those of a window; a mixture alone has no use for the pyramid."""
        if self.settings.reads_latents:
            assert isinstance(self.memory, ContextState)
            context, self.memory = self.prior.contextualiser(latents, mask, doc_start, self.memory, after)
            self.context = context.of(mask.sum(dim=1, keepdim=True))

    def _remember_own(self, latents: Tensor, opens: Tensor, after: Tensor, closed: Tensor) -> None:
        """The same for one chunk a row; a document that it closes is followed by a new one, should anyone go on."""
        if not self.settings.reads_latents:
            return
        # what is kept for writing can no longer be hidden
        if (
            isinstance(self.memory, ContextState)
            and self.settings.guidance == 1
            and not self.settings.is_one_step
            and can_keep(self.prior, self.memory)
        ):
            self.memory = KeptContext(self.prior, self.memory)
        if isinstance(self.memory, KeptContext):
            self.context = self.memory.add(latents[:, 0], after[:, 0], closed)
            return
        self._remember(latents, torch.ones_like(opens), opens, after)
        if bool(closed.any()):
            fresh = self.prior.initial_state(len(closed), self.device)
            memory: ContextState = select_rows(closed, fresh, self.memory)
            self.memory, self.context = memory, self._read_nothing(memory)

    def sample_latents(self) -> Tensor:
        """z_0 of the next chunk of every row. (b z)."""
        if self.settings.is_one_step:
            assert isinstance(self.context, Context)
            self.calls += 1
            u, noise = draw_rows(self.prior.latent_dim, self.generators, self.device)
            heat = self.settings.temperature
            return self.prior.draw_once(self.context, u[:, None], noise[:, None], heat)[:, 0, 0]
        if self.plan is None:
            mixture = self.prior.mixture
            if mixture is None:
                raise ValueError("this prior has no mixture to draw from: take 1 step or more")
            opens = torch.tensor(self.opens, device=self.device)
            weights = mixture.log_weights(self.encoder.known * ~opens[:, None])
            gamma_0, heat = self.prior.diffusion.gamma_0, self.settings.temperature
            return mixture.sample(gamma_0, weights, self.generators, heat)
        guidance = self.settings.guidance
        context, blind = self.context, None
        told = self.prior.tell(context) if isinstance(context, Context) else context
        if guidance != 1:
            assert isinstance(context, Context)
            hidden = torch.ones_like(context.visible[..., 0])
            blind = self.prior.tell(self.prior.hide(context, hidden))
        estimate: Tensor | None = None

        def denoise(z: Tensor, gamma: Tensor) -> Tensor:
            nonlocal estimate
            z, gamma = z[:, None, None], gamma[:, None, None]
            x0 = self.prior.denoise(z, gamma, told, estimate)
            self.calls += 1
            if blind is not None:
                without = self.prior.denoise(z, gamma, blind, estimate)
                x0 = without + guidance * (x0 - without)
                self.calls += 1
            if self.prior.settings.self_conditioning:
                estimate = x0
            return x0[:, 0, 0]

        shape, temperature = (len(self.generators), self.prior.latent_dim), self.settings.temperature
        if self.planned is None and guidance == 1 and can_denoise(self.prior, self.plan):
            self.planned = PlannedSteps(self.prior, self.plan)
        if self.planned is not None:
            self.calls += self.settings.steps
            draws = 1 + self.settings.steps if self.plan.draws else 1
            noise = draw_noise(draws, shape, self.generators, temperature, self.device)
            return self.planned.draw(told, noise[0], noise[1:])
        return sample(
            denoise,
            shape,
            self.prior.schedule,
            steps=self.settings.steps,
            scheduler=self.settings.solver,
            generators=self.generators,
            temperature=temperature,
            device=self.device,
            plan=self.plan,
        )

    def write(self) -> list[Piece]:
        """Sample and write one chunk a row."""
        written = write_chunks(
            self.autoencoder,
            require_finite(self.sample_latents(), "latents", self.settings),
            self.encoder,
            self.decoder,
            self.opens,
            self.settings,
            self.generators,
        )
        self._read_own(written)
        self.opens = [piece.ends_document for piece in written.pieces]
        return written.pieces


class ByteWriter:
    """The twin: writes byte by byte, a chunk's worth of them at a time."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        prompts: Sequence[bytes],
        settings: GenerationConfig,
        generators: Sequence[torch.Generator],
    ):
        self.autoencoder, self.settings, self.generators = autoencoder, settings, generators
        self.device = next(autoencoder.parameters()).device
        self.calls = 0
        rows = len(prompts)
        self.state = autoencoder.decoder_state(rows, self.device)
        starts = [autoencoder.chunker.chunk_start(prompt) for prompt in prompts]
        for window in _prompt_windows(prompts, starts, self.device):
            text, length, doc_start, chunk_start, _ = window
            never = torch.zeros_like(doc_start)
            events = autoencoder.events(text, length, doc_start, never, chunk_start, self.state)
            _, griffin = autoencoder.decode(
                events.symbol,
                None,
                events.chunk,
                events.doc_start,
                events.unit_start,
                self.state.griffin,
                events.length,
            )
            self.state = DecoderState(griffin, events.last)
        self.opens = [not prompt for prompt in prompts]

    def write(self) -> list[Piece]:
        """Write max_bytes symbols a row, or up to the end of the document."""
        pieces, self.state = write_bytes(
            self.autoencoder, self.state, self.opens, self.settings, self.generators
        )
        self.opens = [piece.ends_document for piece in pieces]
        return pieces


def make_writer(
    autoencoder: Autoencoder,
    prior: Prior | None,
    prompts: Sequence[bytes],
    settings: GenerationConfig,
    generators: Sequence[torch.Generator],
) -> Writer:
    """The writer that fits the model: with a prior over latents, or the twin's."""
    if autoencoder.latent_dim == 0:
        return ByteWriter(autoencoder, prompts, settings, generators)
    if prior is None:
        raise ValueError("this autoencoder has no prior yet: train one with train_diffusion.py")
    return LatentWriter(autoencoder, prior, prompts, settings, generators)


@torch.no_grad()
def write_on(
    autoencoder: Autoencoder,
    prior: Prior | None,
    prompts: Sequence[bytes],
    settings: GenerationConfig,
    *,
    max_characters: int,
    seed: int = 0,
    through_ends: bool = False,
) -> Iterator[tuple[list[Continuation], list[bytes], int]]:
    """Continue each prompt; yields (continuations so far, what each row just wrote, denoiser calls).

    A row stops after `max_characters`, cut there, or where the model ends the document (unless
    through_ends). The last yield holds the finished continuations.
    """
    if not prompts:
        raise ValueError("no prompt given: pass at least one, '' starts a document")
    if max_characters < 1:
        raise ValueError(f"max_characters must be at least 1, got {max_characters}")
    config = Config(autoencoder=autoencoder.settings, chunking=autoencoder.chunking)
    if prior is not None:
        config = replace(config, prior=prior.settings, hierarchy=prior.hierarchy)
    require_room_to_write(config, len(prompts), max_characters, max(map(len, prompts)))
    rows = [Continuation(prompt) for prompt in prompts]
    writer = make_writer(autoencoder, prior, prompts, settings, row_generators(seed, len(prompts)))
    left = [_Budget(max_characters) for _ in rows]
    while True:
        news = []
        for row, budget, piece in zip(rows, left, writer.write(), strict=True):
            text = b"" if row.ended else budget.take(piece.text)
            if text:
                row.chunks.append(text)
            row.ended |= piece.ends_document and not through_ends and budget.characters > 0
            news.append(text)
        yield rows, news, writer.calls
        if all(row.ended or budget.characters == 0 for row, budget in zip(rows, left, strict=True)):
            return


class _Budget:
    """Counts down UTF-8 characters over pieces that may break inside one."""

    def __init__(self, characters: int):
        self.characters = characters  # still to write
        self.broken = b""  # the start of a character whose rest has not come yet

    def take(self, piece: bytes) -> bytes:
        """As much of the piece as fits."""
        if self.characters == 0:
            return b""
        whole, broken = split_incomplete(self.broken + piece)
        written = len(self.broken)  # of `whole`: taken before
        fitting = _cut(whole, self.characters)
        self.characters -= count_characters(fitting)
        self.broken = broken if self.characters else b""
        return (fitting + self.broken)[written:]


def _cut(text: bytes, characters: int) -> bytes:
    """The first so many UTF-8 characters."""
    if count_characters(text) <= characters:
        return text
    end = len(text)
    while end > 0 and count_characters(text[:end]) > characters:
        end -= 1
    return text[:end]
