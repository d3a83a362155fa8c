"""Prompt -> text, a chunk at a time, nothing computed twice.

    context --sample--> z_0 of the next chunk --decode until it ends--> bytes --encode--> latent --> context

Encoder, pyramid and (if carried) decoder keep their state, so a character costs the same however long
the text. Each row draws from its own generator: a batch of prompts writes what they write one by one.
The twin writes byte by byte behind the same interface. `hldm.kernels.writer` holds the same writers in C++.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hldm.chunking.strategies import chunker_of
from hldm.config import GenerationConfig
from hldm.generation.chunk import Piece, Written, write_bytes, write_chunks
from hldm.generation.draft import Draft
from hldm.generation.finite import require_finite
from hldm.model.autoencoder import Autoencoder
from hldm.model.contextualiser import Context
from hldm.model.denoiser import Conditioning
from hldm.model.diffusion import sample, sampler_steps
from hldm.model.prior import Prior
from hldm.model.speed import has_faster_form
from hldm.model.state import ContextState, DecoderState, pick_rows, select_rows
from hldm.text.bytes import PROMPT_WINDOW, stream_decoder
from hldm.text.windows import Window, window_of


class Writer(Protocol):
    """Writes on from prompts; `write` gives one piece a row and remembers where it is."""

    calls: int  # denoiser evaluations so far

    def write(self) -> list[Piece]: ...


Through: TypeAlias = Callable[
    [Writer, Sequence[bytes]], Writer
]  # what makes another writer of one, and its prompts


def row_generators(seed: int | Sequence[int], rows: int) -> list[torch.Generator]:
    """One generator a row: row i of seed s is row 0 of seed s + i; of a seed for each row, that."""
    seeds = range(seed, seed + rows) if isinstance(seed, int) else seed
    return [torch.Generator().manual_seed(each) for each in seeds]


# ---- the steps from chunk to chunk


def next_context(prior: Prior, memory: ContextState) -> Context:
    """The context of the chunk that comes next (b 1 ...), from what is remembered of those before it."""
    device, rows = memory.written.device, len(memory.written)
    none = torch.zeros(rows, 0, dtype=torch.bool, device=device)
    context, _ = prior.contextualiser(
        torch.zeros(rows, 0, prior.latent_dim, device=device), none, none, memory
    )
    return context.first(1)


# ---- the writers


class LatentWriter:
    """The latent model: samples a latent, writes its chunk, reads it back.

    What is carried from chunk to chunk are values, which are replaced and never written into.
    """

    write_chunks = staticmethod(write_chunks)

    def __init__(
        self,
        autoencoder: Autoencoder,
        prior: Prior,
        prompts: Sequence[bytes],
        settings: GenerationConfig,
        generators: Sequence[torch.Generator],
    ):
        """Reads the prompts. Raises ValueError when no denoising is asked for and there is no mixture."""
        if not settings.steps and prior.mixture is None:
            raise ValueError("this prior has no mixture to draw from: take 1 step or more")
        self.autoencoder, self.prior, self.settings = autoencoder, prior, settings
        self.generators = generators
        self.device = next(autoencoder.parameters()).device
        self.calls = 0
        self.plan = (
            sampler_steps(settings.scheduler, prior.schedule, settings.steps) if settings.steps else None
        )
        # Ancestral steps draw x0 as the mixture's own reverse process does: exact at any number of steps where the
        # network has nothing to add. Of its mean alone, 4 steps would take 12 to 20 % off the latents' deviation.
        self.draws_x0 = settings.scheduler == "ancestral" and prior.mixture is not None
        rows = len(prompts)
        self.encoder = autoencoder.encoder_state(rows, self.device)
        self.decoder = autoencoder.decoder_state(rows, self.device)
        self.memory = prior.initial_state(rows, self.device)  # the pyramid; stays so without denoising
        self.blind: Conditioning | None = None  # conditioning on no text; None without guidance
        if settings.guidance != 1:
            nothing = next_context(prior, self.memory)
            self.blind = prior.condition(prior.hide(nothing, torch.ones_like(nothing.visible[..., 0])))
        for window in _prompt_windows(autoencoder, prompts, self.device):
            self._read(window)
        # of the denoiser, for the next chunk
        self.conditioning = prior.condition(next_context(prior, self.memory))
        self.opens = [not prompt for prompt in prompts]  # whether the next chunk is the first of its document

    def _read(self, window: Window) -> None:
        """Take in whole chunks of a prompt: advance encoder, pyramid and a carried decoder."""
        encoding, self.encoder = self.autoencoder.encode(window, self.encoder)
        if self.settings.steps:
            _, self.memory = self.prior.contextualiser(
                encoding.latents, encoding.mask, encoding.doc_start, self.memory, encoding.after
            )
        if self.autoencoder.settings.carry_state:
            events = self.autoencoder.events(window, self.decoder)
            # the mean of what the decoder was trained on
            gamma_0 = torch.tensor(self.prior.diffusion.gamma_0, device=self.device)
            mean = encoding.latents * torch.sigmoid(-gamma_0).sqrt()
            conditioning = self.autoencoder.condition(events, encoding)
            _, griffin = self.autoencoder.decode(events, mean, self.decoder.griffin, conditioning)
            self.decoder = DecoderState(griffin, events.last)

    def write(self, latents: Tensor | None = None) -> list[Piece]:
        """Sample and write one chunk a row; latents: their z_0 (b z), in place of drawn ones."""
        written = self.draw(latents)
        self.take_in(written)
        return written.pieces

    def draw(self, latents: Tensor | None = None) -> Written:
        """As `write`, but nothing is remembered before `take_in`."""
        z_0 = self.sample_latents() if latents is None else latents
        return self.write_chunks(
            self.autoencoder,
            require_finite(z_0, "latents", self.settings),
            self.encoder,
            self.decoder,
            self.opens,
            self.settings,
            self.generators,
        )

    def take_in(self, written: Written) -> None:
        """Remember one chunk a row, drawn or read: the next one comes after it."""
        closed = torch.tensor([piece.ends_document for piece in written.pieces], device=self.device)
        opens = torch.tensor(self.opens, device=self.device)[:, None]
        self.encoder, self.decoder = written.encoder, written.decoder
        if self.settings.steps:
            self.add_chunks(written.latents, opens, closed)
        self.opens = closed.tolist()

    def pick(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> LatentWriter:
        """A writer of some of these rows, in this order, each as often as named; this one stays as it is.

        generators: one for each of them
        """
        index, other = torch.tensor(rows, device=self.device), copy(self)
        parts = (self.encoder, self.decoder, self.memory, self.conditioning, self.blind)
        other.encoder, other.decoder, other.memory, other.conditioning, other.blind = pick_rows(parts, index)
        other.opens, other.generators = [self.opens[row] for row in rows], generators
        return other

    def sample_latents(self) -> Tensor:
        """z_0 of the next chunk of every row (b z); without denoising a draw from the mixture."""
        prior, settings = self.prior, self.settings
        if self.plan is None:
            assert prior.mixture is not None
            opens = torch.tensor(self.opens, device=self.device)
            log_weights = prior.mixture.log_weights(self.encoder.known * ~opens[:, None])
            gamma_0 = prior.diffusion.gamma_0
            return prior.mixture.sample(gamma_0, log_weights, self.generators, settings.temperature)
        self.calls += settings.steps * (1 if self.blind is None else 2)
        shape = (len(self.generators), prior.latent_dim)
        return sample(
            self._denoise,
            shape,
            self.plan,
            self.generators,
            settings.temperature,
            self.device,
            self._spread if self.draws_x0 else None,
        )

    def _spread(self, z: Tensor, gamma: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.prior.spread(z, gamma, self.conditioning, u, self.settings.temperature)

    def _denoise(self, z: Tensor, gamma: Tensor) -> Tensor:
        """x0_hat (b z) from z (b z) at gamma (b).

        With guidance x0 = x0_blind + guidance (x0_conditioned - x0_blind) (arXiv 2207.12598).
        """
        z, gamma = z[:, None, None], gamma[:, None, None]  # (b n=1 m=1 z), (b 1 1)
        x0 = self.prior.denoise(z, gamma, self.conditioning)
        if self.blind is not None:
            blind = self.prior.denoise(z, gamma, self.blind)
            x0 = blind + self.settings.guidance * (x0 - blind)
        return x0[:, 0, 0]

    def add_chunks(self, latents: Tensor, opens: Tensor, closed: Tensor) -> None:
        """Take in one chunk a row more, and update the denoiser's conditioning for the next.

        latents: (b 1 z);  opens: (b 1) bool, the first chunk of a document
        closed: (b) bool, the last of its document: the next one has no past, should anyone go on
        """
        always, after = torch.ones_like(opens), self.encoder.known[:, None]
        context, self.memory = self.prior.contextualiser(latents, always, opens, self.memory, after)
        context = context.of(always.long())
        if bool(closed.any()):
            fresh = self.prior.initial_state(len(closed), closed.device)
            self.memory = select_rows(closed, fresh, self.memory)
            context = next_context(self.prior, self.memory)
        self.conditioning = self.prior.condition(context)


class Stretch(NamedTuple):
    """What the twin wrote, and its state after it."""

    pieces: list[Piece]
    decoder: DecoderState


class ByteWriter:
    """The twin: writes byte by byte, a chunk's worth of them at a time."""

    write_bytes = staticmethod(write_bytes)

    def __init__(
        self,
        autoencoder: Autoencoder,
        prompts: Sequence[bytes],
        settings: GenerationConfig,
        generators: Sequence[torch.Generator],
    ):
        self.autoencoder, self.settings, self.generators = autoencoder, settings, generators
        device = next(autoencoder.parameters()).device
        self.calls = 0
        self.state = autoencoder.decoder_state(len(prompts), device)
        for window in _prompt_windows(autoencoder, prompts, device):
            events = autoencoder.events(window, self.state)
            _, griffin = autoencoder.decode(events, None, self.state.griffin)
            self.state = DecoderState(griffin, events.last)
        self.opens = [not prompt for prompt in prompts]

    def write(self) -> list[Piece]:
        """Write max_bytes symbols a row, or up to the end of the document."""
        stretch = self.draw()
        self.take_in(stretch)
        return stretch.pieces

    def draw(self) -> Stretch:
        """Write as many symbols, of which nothing is remembered before `take_in`."""
        return Stretch(
            *self.write_bytes(self.autoencoder, self.state, self.opens, self.settings, self.generators)
        )

    def take_in(self, stretch: Stretch) -> None:
        """Remember one stretch a row, drawn or read."""
        self.state = stretch.decoder
        self.opens = [piece.ends_document for piece in stretch.pieces]

    def pick(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> ByteWriter:
        """As `LatentWriter.pick`."""
        other = copy(self)
        other.state = pick_rows(self.state, torch.tensor(rows, device=self.state.symbol.device))
        other.opens, other.generators = [self.opens[row] for row in rows], generators
        return other


@has_faster_form
def make_writer(
    autoencoder: Autoencoder,
    prior: Prior | None,
    prompts: Sequence[bytes],
    settings: GenerationConfig,
    generators: Sequence[torch.Generator],
    draft: Draft | None = None,
) -> Writer:
    """The writer that fits the model: with a prior over latents, or the twin's.

    draft: guesses what the decoder writes, which changes how fast that is and not what; only faster forms ask it
    """
    if autoencoder.latent_dim == 0:
        return ByteWriter(autoencoder, prompts, settings, generators)
    if prior is None:
        raise ValueError("this autoencoder has no prior yet: train one with train_diffusion.py")
    return LatentWriter(autoencoder, prior, prompts, settings, generators)


# ---- prompts and continuations


@dataclass
class Continuation:
    """What was written after one prompt."""

    prompt: bytes
    chunks: list[bytes] = field(default_factory=list)
    left: int = 0  # UTF-8 characters still to write; an invalid byte counts as one
    ended: bool = False  # the model closed the document

    def __post_init__(self) -> None:
        self._decoder = stream_decoder("surrogateescape")

    def add(self, piece: bytes) -> bytes:
        """As much of a piece as there are characters left, which may break inside of one."""
        taken, _ = self._decoder.getstate()  # the start of a character whose rest has not come yet
        fitting = self._decoder.decode(piece)[: self.left]
        self.left -= len(fitting)
        broken = self._decoder.getstate()[0] if self.left else b""
        text = (fitting.encode("utf-8", "surrogateescape") + broken)[len(taken) :]
        self.chunks += [text] if text else []
        return text

    @property
    def text(self) -> bytes:
        """The chunks in one."""
        return b"".join(self.chunks)

    @property
    def chunk_spans(self) -> list[tuple[int, int]]:
        """Where each chunk begins and ends in the text."""
        return list(pairwise(accumulate(map(len, self.chunks), initial=0)))


def _prompt_windows(
    autoencoder: Autoencoder, prompts: Sequence[bytes], device: torch.device
) -> Iterator[Window]:
    """Cut prompts at chunk borders into windows of about PROMPT_WINDOW bytes in all; short ones run out early.

    All have one shape, so that the memory which one gives back fits the next. Tensors of ever other sizes leave
    glibc's heap in pieces, the more of them the longer the text.
    """
    chunker = chunker_of(autoencoder)
    starts = [chunker.chunk_start(prompt) for prompt in prompts]
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
        opens = [index == 0] * len(prompts)
        yield window_of(pieces, flags, opens, device, width=width, chunks=chunks)


def nothing_written(prompts: Sequence[bytes], max_characters: int) -> list[Continuation]:
    """A continuation of each prompt, all to be written. Raises ValueError where there is nothing to do."""
    if not prompts:
        raise ValueError("no prompt given: pass at least one, '' starts a document")
    if max_characters < 1:
        raise ValueError(f"max_characters must be at least 1, got {max_characters}")
    return [Continuation(prompt, left=max_characters) for prompt in prompts]


@torch.no_grad()
def write_on(
    autoencoder: Autoencoder,
    prior: Prior | None,
    prompts: Sequence[bytes],
    settings: GenerationConfig,
    *,
    max_characters: int,
    seed: int | Sequence[int] = 0,
    through_ends: bool = False,
    through: Through | None = None,
    draft: Draft | None = None,
) -> Iterator[tuple[list[Continuation], list[bytes], int]]:
    """Continue each prompt; yields (continuations so far, what each row just wrote, denoiser calls).

    A row stops after `max_characters`, cut there, or where the model ends the document (unless
    through_ends). The last yield holds the finished continuations.
    through: makes another writer of the model's, such as one that remembers (hldm.generation.remembering)
    draft: see `make_writer`
    """
    rows = nothing_written(prompts, max_characters)
    writer = make_writer(autoencoder, prior, prompts, settings, row_generators(seed, len(prompts)), draft)
    if through is not None:
        writer = through(writer, prompts)
    while any(row.left and not row.ended for row in rows):
        news = []
        for row, piece in zip(rows, writer.write(), strict=True):
            news.append(b"" if row.ended else row.add(piece.text))
            row.ended |= piece.ends_document and not through_ends and row.left > 0
        yield rows, news, writer.calls
