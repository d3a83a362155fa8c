"""Text between two texts, and single chunks of a text written anew.

    candidates m ~ p(m | left),  weighed by p(right | left, m):  importance sampling of p(m | left, right)

Candidates are drawn as any text is. How well `right` follows each of them is the bound of its chunks
(`hldm.generation.bound`), all under the same noise. Knows no files.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.chunking.reading import held_out_windows, prompt_chunker
from hldm.config import GenerationConfig
from hldm.generation.bound import bound_chunks
from hldm.generation.branches import make_branches, write_branches
from hldm.generation.encode import encode_texts
from hldm.generation.footprint import require_room_to_write
from hldm.generation.score import as_documents
from hldm.generation.seeds import row_seeds
from hldm.generation.writer import write_on
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import alpha_sigma
from hldm.model.prior import Prior
from hldm.text.corpus import make_corpus
from hldm.text.noise import PlacedGenerator

MAX_CANDIDATES = 1024  # 64 take seconds; each is read again with the text on both of its sides
MAX_CHARACTERS = 20_000  # of a candidate
SAMPLES = (
    8  # importance-weighted draws a chunk: an error of 2.2 bits in 320 characters (measured), 1.9 with 16
)
DRAWS = 2  # of the plain bound, the least: taken where there is no mixture to weigh by


class Candidate(NamedTuple):
    """One text that may stand between two others."""

    chunks: list[bytes]
    middle: float  # bits of it after the left text
    right: float  # bits of the right text after both
    error: float  # standard error of `right`, Monte Carlo

    @property
    def text(self) -> bytes:
        """The chunks in one."""
        return b"".join(self.chunks)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "text": self.text.decode("utf-8", "replace"),
            "chunks": [chunk.decode("utf-8", "replace") for chunk in self.chunks],
            "middle_bits": self.middle,
            "right_bits": self.right,
            "right_error": self.error,
        }


class Costs(NamedTuple):
    """What candidates cost, in bits, a number for each."""

    middle: np.ndarray  # after the left text
    right: np.ndarray  # of the right text, after left text and candidate
    error: np.ndarray  # standard error of `right`


# ---- candidates


@torch.no_grad()
def draw_candidates(
    autoencoder: Autoencoder,
    prior: Prior | None,
    left: bytes,
    count: int,
    settings: GenerationConfig,
    *,
    characters: int | None = None,
    chunks: int | None = None,
    held: Tensor | None = None,
    seed: int = 0,
) -> list[list[bytes]]:
    """Chunks of `count` continuations of `left`, of so many characters or chunks; candidate i draws from seed + i.

    held: (chunks z) latents mu to write again, with the noise of z_0 drawn anew for each candidate
    Continuations that close the document, after which nothing can stand, are left out.
    Raises ValueError where none is left.
    """
    seeds = row_seeds(seed, None, count)
    if chunks is None:
        assert characters is not None
        prompts = [left] * count
        writing = write_on(autoencoder, prior, prompts, settings, max_characters=characters, seed=seeds)
        rows, _, _ = deque(writing, maxlen=1).pop()
        found = [row.chunks for row in rows if not row.ended]
    else:
        writer = make_branches(autoencoder, prior, [left], settings, [seeds])
        if held is not None:
            assert prior is not None
            gamma_0 = torch.tensor(prior.diffusion.gamma_0, device=held.device)
            alpha, sigma = alpha_sigma(gamma_0)
            noise = torch.stack([torch.randn(held.shape, generator=g) for g in writer.generators])
            held = alpha * held + settings.temperature * sigma * noise.to(held.device)  # (b chunks z)
        found = [each.chunks for each in write_branches(writer, chunks, held) if not each.ends_document]
    if not found:
        raise ValueError(
            f"all of {count} candidates end the document, so nothing can follow them: "
            "ask for a shorter text, for more candidates or for another seed"
        )
    return found


# ---- what they cost


def cost_candidates(
    autoencoder: Autoencoder,
    prior: Prior | None,
    left: bytes,
    middles: Sequence[Sequence[bytes]],
    right: bytes,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Costs:
    """Bits of each candidate after `left`, and of `right` after both.

    The importance-weighted bound of `samples` draws, where the prior has a mixture, else the plain one; of the twin
    the likelihood itself. Candidates keep the chunks they were written in. All share the noise of their first chunk,
    their second, and so on, and of those of `right`.
    """
    chunker = prompt_chunker(autoencoder)
    before, after = (chunker.chunk_start(text) for text in (left, right))
    if prior is None:  # costs by chunk need chunks of the chunker's own length
        middles = [_cut(b"".join(chunks), chunker.chunk_start(b"".join(chunks))) for chunks in middles]
    own = [np.concatenate([np.arange(len(chunk)) == 0 for chunk in chunks]) for chunks in middles]
    corpus = make_corpus("candidates", (left + b"".join(chunks) + right for chunks in middles))
    chunk_start = np.concatenate([part for starts in own for part in (before, starts, after)])
    windows = held_out_windows(
        autoencoder, corpus, chunk_start, lanes=32, closes=np.zeros(len(corpus), dtype=bool)
    )

    # the place of a chunk: from 0 on in `right`, from -2^40 on in a candidate, from -2^41 on in `left`
    n_left, n_right = int(before.sum()), int(after.sum())
    place = np.concatenate(
        [
            np.concatenate([np.arange(n_left) - 2**41, np.arange(len(chunks)) - 2**40, np.arange(n_right)])
            for chunks in middles
        ]
    )
    tight = prior is not None and prior.mixture is not None and not autoencoder.settings.carry_state
    found = bound_chunks(
        autoencoder,
        prior,
        windows,
        draws=DRAWS,
        samples=samples if tight else 0,
        generator=PlacedGenerator(seed, place),
    )
    nats, variance = found.nats, np.square(found.difference / 2)
    if found.importance is not None and found.importance_variance is not None:
        nats, variance = found.importance, found.importance_variance
    unit = math.log(2)
    costs = []
    at = 0
    for chunks in middles:
        first, second = at + n_left, at + n_left + len(chunks)
        at = second + n_right
        costs.append(
            (
                nats[first:second].sum() / unit,
                nats[second:at].sum() / unit,
                math.sqrt(variance[second:at].sum()) / unit,
            )
        )
    return Costs(*(np.array(column) for column in zip(*costs, strict=True)))


def _cut(text: bytes, starts: np.ndarray) -> list[bytes]:
    """A text in its chunks."""
    edges = [*np.flatnonzero(starts).tolist(), len(text)]
    return [text[begin:end] for begin, end in zip(edges[:-1], edges[1:], strict=True)]


def _ranked(
    autoencoder: Autoencoder,
    prior: Prior | None,
    left: bytes,
    middles: Sequence[list[bytes]],
    right: bytes,
    seed: int,
) -> list[Candidate]:
    """Candidates by what `right` costs after them, the best first; in their own order where nothing is to follow."""
    costs = cost_candidates(autoencoder, prior, left, middles, right, seed=seed)
    found = [
        Candidate(chunks, *map(float, row))
        for chunks, *row in zip(middles, costs.middle, costs.right, costs.error, strict=True)
    ]
    return sorted(found, key=lambda candidate: candidate.right)


# ---- fill and edit


def fill_between(
    autoencoder: Autoencoder,
    prior: Prior | None,
    left: str | bytes,
    right: str | bytes,
    settings: GenerationConfig,
    *,
    characters: int | None = None,
    chunks: int | None = None,
    candidates: int = 16,
    seed: int = 0,
) -> list[Candidate]:
    """Texts of so many characters or chunks that may stand between two, the one before which `right` is cheapest first.

    Candidates are drawn from p(m | left), which is why they are ranked by p(right | left, m) alone.
    Raises ValueError, one line.
    """
    before = as_documents([left], "left")[0] if left else b""
    if not right:
        raise ValueError(
            "right is empty: nothing decides between candidates; hldm generate writes on from the left"
        )
    after = as_documents([right], "right")[0]
    if (characters is None) == (chunks is None):
        raise ValueError("give the length of the text to fill in by characters or by chunks, one of the two")
    check_counts(candidates, characters, chunks)
    if prior is None and chunks is not None:
        raise ValueError("the twin writes no chunks: give the length in characters")
    size = chunks * autoencoder.chunking.max_bytes if chunks is not None else characters
    require_room_to_write(autoencoder, prior, [before], candidates, int(size or 0))
    middles = draw_candidates(
        autoencoder, prior, before, candidates, settings, characters=characters, chunks=chunks, seed=seed
    )
    return _ranked(autoencoder, prior, before, middles, after, seed)


class Edited(NamedTuple):
    """A text, some of whose chunks were written anew."""

    before: list[bytes]  # its chunks as they were
    first: int  # of the chunks written anew, from 0
    last: int  # and the last of them
    candidates: list[Candidate]  # the best first

    @property
    def chunks(self) -> list[bytes]:
        """The text as it is now."""
        return [*self.before[: self.first], *self.candidates[0].chunks, *self.before[self.last + 1 :]]

    @property
    def text(self) -> bytes:
        """The same, in one."""
        return b"".join(self.chunks)


def split_text(autoencoder: Autoencoder, text: str | bytes) -> list[bytes]:
    """A text in the model's chunks. Raises ValueError for an empty one."""
    data = as_documents([text], "text")[0]
    return _cut(data, prompt_chunker(autoencoder).chunk_start(data))


def edit_chunks(
    autoencoder: Autoencoder,
    prior: Prior | None,
    text: str | bytes,
    redraw: tuple[int, int],
    settings: GenerationConfig,
    *,
    hold_latents: bool = False,
    candidates: int = 16,
    seed: int = 0,
) -> Edited:
    """Write chunks redraw[0] to redraw[1] of a text anew (numbered from 1); the others stay as they are.

    As many chunks are drawn, and ranked by what the text after them then costs.
    hold_latents: keep what the chunks' latents say, and only write their bytes again. At temperature and
    decoder_temperature 0 nothing is left to chance.
    Raises ValueError, one line.
    """
    if prior is None:
        raise ValueError("the twin has no latents and no chunks of its own: take the run with latents")
    chunks = split_text(autoencoder, text)
    first, last = redraw[0] - 1, redraw[1] - 1
    if not 0 <= first <= last < len(chunks):
        raise ValueError(
            f"the text has chunks 1 to {len(chunks)}, got {redraw[0]}-{redraw[1]}: take some of these, the first first"
        )
    check_counts(candidates, None, last - first + 1)
    left, right = b"".join(chunks[:first]), b"".join(chunks[last + 1 :])
    count = last - first + 1
    size = count * autoencoder.chunking.max_bytes
    require_room_to_write(autoencoder, prior, [left], candidates, size)
    held = None
    if hold_latents:
        latents = encode_texts(autoencoder, b"".join(chunks), pooled=False)
        held = latents[0][first : last + 1].to(next(autoencoder.parameters()).device)
    middles = draw_candidates(
        autoencoder, prior, left, candidates, settings, chunks=count, held=held, seed=seed
    )
    return Edited(chunks, first, last, _ranked(autoencoder, prior, left, middles, right, seed))


def check_counts(candidates: int, characters: int | None, chunks: int | None) -> None:
    """Raise ValueError, one line, for more candidates or longer ones than are drawn at a time, or none."""
    most_chunks = MAX_CHARACTERS // 4
    for name, value, most in (
        ("candidates", candidates, MAX_CANDIDATES),
        ("characters", characters, MAX_CHARACTERS),
        ("chunks", chunks, most_chunks),
    ):
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name} must lie in 1..{most:,}, got {value:,}")
