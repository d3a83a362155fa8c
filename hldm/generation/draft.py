"""Drafts: tables that guess what a decoder writes next, made from training text; there is nothing to train.

Speculation without loss (Leviathan et al., arXiv 2211.17192, with the draws coupled by common random numbers): the
decoder reads several guesses in one pass and always emits its own choice, so a draft changes how fast text is written
and never which. The latent model's draft is a dictionary of chunks: the one likeliest given the latent, among those
that begin with what is written. The twin's knows what most often follows the last bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hldm.chunking.strategies import chunker_of
from hldm.model.autoencoder import Autoencoder
from hldm.runs.clock import clock_named
from hldm.runs.files import atomic_write, fingerprint
from hldm.sources.notes import first_line
from hldm.text.corpus import Corpus
from hldm.text.windows import Windows

FILE = "draft.safetensors"
STRINGS = 16_384  # of a dictionary, the most frequent; not tuned
ORDER = 7  # bytes of a context, at most
LANES, WINDOW_BYTES = 16, 256  # of the text that is read
PRIOR_COUNT = 4.0  # chunks that the common variance weighs in a string's own


@dataclass(frozen=True, eq=False)
class ChunkDraft:
    """Chunks of a text, sorted, and where their latents lie.

    A string's score is log(count) + log N(z; m, v), without what all have alike: terms_0 + sum_j (terms_{1+2j} z_j +
    terms_{2+2j} z_j^2), m and v being mean and variance of z_0 over its occurrences.
    """

    model: str  # fingerprint of the autoencoder
    terms: Tensor  # (2z+1 strings)
    text: Tensor  # (.) uint8, all strings in a row
    at: Tensor  # (strings+1) where each begins

    def __post_init__(self) -> None:
        at = self.at.tolist()
        whole = (
            at[:1] == [0]
            and at[-1] == len(self.text)
            and all(a < b for a, b in zip(at, at[1:], strict=False))
        )
        if not whole or self.terms.shape[1] != len(at) - 1 or not bool(self.terms.isfinite().all()):
            raise ValueError("strings and scores do not fit together or are not finite")
        strings = self.strings
        if any(a >= b for a, b in zip(strings, strings[1:], strict=False)):
            raise ValueError("strings are not sorted")

    @property
    def strings(self) -> list[bytes]:
        text, at = self.text.numpy().tobytes(), self.at.tolist()
        return [text[a:b] for a, b in zip(at, at[1:], strict=False)]

    def scores(self, latent: Tensor) -> Tensor:
        """(strings) of z_0 = latent (z)."""
        return self.terms[0] + latent @ self.terms[1::2] + latent.square() @ self.terms[2::2]

    def guess(self, latent: Tensor, written: bytes) -> bytes | None:
        """The likeliest chunk that begins with what is written of it; None: there is none."""
        strings, scores = self.strings, self.scores(latent)
        fitting = [i for i, string in enumerate(strings) if string.startswith(written)]
        return strings[max(fitting, key=lambda i: float(scores[i]))] if fitting else None


@dataclass(frozen=True, eq=False)
class TextDraft:
    """What follows each context of up to ORDER bytes most often; a context's key is its length << 56 | its bytes."""

    model: str  # fingerprint of the autoencoder
    keys: Tensor  # (contexts) int64, sorted
    following: Tensor  # (contexts) uint8

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.following) or not bool((self.keys[1:] > self.keys[:-1]).all()):
            raise ValueError("contexts are not sorted, or not as many as what follows")

    def guess(self, text: bytes) -> int | None:
        """The byte that most often follows the longest context that is known; None: none is."""
        for order in range(min(ORDER, len(text)), 0, -1):
            key = order << 56 | int.from_bytes(text[-order:], "big")
            at = int(torch.searchsorted(self.keys, key))
            if at < len(self.keys) and int(self.keys[at]) == key:
                return int(self.following[at])
        return None


Draft = ChunkDraft | TextDraft


def check_draft(draft: Draft, autoencoder: Autoencoder) -> None:
    """Raise ValueError, one line, unless a draft was made for this model."""
    if draft.model != fingerprint(autoencoder.state_dict()):
        raise ValueError("this draft was made for another model: make one with hldm draft --run RUN")


# ---- to make one


def make_draft(
    autoencoder: Autoencoder,
    gamma_0: float,
    corpus: Corpus,
    *,
    minutes: float,
    clock: str = "wall",
    say: Callable[[str], None] = lambda line: None,
) -> Draft:
    """A draft from training text, of which as much is read as the minutes allow; the twin's reads it all in seconds."""
    model = fingerprint(autoencoder.state_dict())
    if not autoencoder.latent_dim:
        return TextDraft(model, *_contexts(corpus))
    strings, latents = _read_chunks(autoencoder, corpus, minutes, clock)
    say(f"read {len(strings):,} chunks")
    return ChunkDraft(model, *_dictionary(strings, latents, gamma_0))


@torch.no_grad()
def _read_chunks(
    autoencoder: Autoencoder, corpus: Corpus, minutes: float, clock: str
) -> tuple[list[bytes], Tensor]:
    """Chunks of a text, once at most, and their latents mu (chunks z)."""
    windows = Windows(corpus, chunker_of(autoencoder), lanes=LANES, window_bytes=WINDOW_BYTES)
    state, now = autoencoder.encoder_state(LANES), clock_named(clock)
    began, strings, latents = now(), [], []
    for step in range(windows.windows_per_epoch):
        batch = windows.batch(step)
        encoding, state = autoencoder.encode(batch, state)
        for row, (text, length) in enumerate(zip(batch.bytes.tolist(), batch.length.tolist(), strict=True)):
            cuts = [*batch.chunk_start[row, :length].nonzero()[:, 0].tolist(), length]
            strings += [bytes(text[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        latents.append(encoding.latents[encoding.mask])
        if now() - began >= 60 * minutes:
            break
    return strings, torch.cat(latents)


def _dictionary(strings: list[bytes], latents: Tensor, gamma_0: float) -> tuple[Tensor, Tensor, Tensor]:
    """Terms, text and places of a `ChunkDraft`, from chunks and their mu (chunks z)."""
    names, index, counts = np.unique(np.array(strings, dtype=object), return_inverse=True, return_counts=True)
    which, count = torch.from_numpy(index.reshape(-1)), torch.from_numpy(counts).double()[:, None]
    mu = latents.double()
    mean = torch.zeros(len(names), mu.shape[1], dtype=mu.dtype).index_add_(0, which, mu) / count
    square = torch.zeros_like(mean).index_add_(0, which, (mu - mean[which]).square())
    common = square.sum(0) / max(len(mu) - len(names), 1)
    spread = (square + PRIOR_COUNT * common) / (count + PRIOR_COUNT) * (1 + 1 / count)
    # z_0 = alpha_0 mu + sigma_0 eps
    signal = 1 / (1 + math.exp(gamma_0))
    mean, variance = math.sqrt(signal) * mean, signal * spread + (1 - signal)
    kept = np.sort(np.argsort(-counts, kind="stable")[:STRINGS])
    mean, variance, count = mean[kept], variance[kept], count[kept, 0]
    constant = count.log() - 0.5 * (variance.log() + mean.square() / variance).sum(1)
    terms = torch.stack([mean / variance, -0.5 / variance], dim=2).flatten(1)  # (strings 2z)
    text = b"".join(names[kept])
    at = np.cumsum([0, *map(len, names[kept])])
    return (
        torch.cat([constant[:, None], terms], dim=1).mT.float().contiguous(),
        torch.frombuffer(bytearray(text), dtype=torch.uint8),
        torch.from_numpy(at),
    )


def _contexts(corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Keys and what follows of a `TextDraft`: contexts seen twice or more, within documents."""
    text = corpus.text.astype(np.int64)
    place = np.arange(len(text)) - np.repeat(corpus.offsets[:-1], np.diff(corpus.offsets))
    found = []
    history = np.zeros_like(text)
    for order in range(1, ORDER + 1):
        history[order:] |= text[:-order] << 8 * (order - 1)
        fits = place >= order
        keys, index = np.unique(history[fits], return_inverse=True)
        pairs, counts = np.unique(index.reshape(-1) * 256 + text[fits], return_counts=True)
        ranked = np.lexsort((-counts, pairs >> 8))
        first = np.unique((pairs >> 8)[ranked], return_index=True)[1]
        best = ranked[first]
        often = counts[best] > 1
        found.append((keys[often] | order << 56, pairs[best][often] & 255))
    keys, following = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return torch.from_numpy(keys), torch.from_numpy(following.astype(np.uint8))


# ---- to and from a file


def save_draft(draft: Draft, folder: Path) -> Path:
    """Write it into a folder, as FILE."""
    tensors = {name: value for name, value in vars(draft).items() if isinstance(value, Tensor)}
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / FILE, save(tensors, metadata={"model": draft.model}))
    return folder / FILE


def read_draft(path: Path, autoencoder: Autoencoder) -> Draft:
    """The draft of a model. Raises FileNotFoundError or ValueError, one line: none there, damaged, of another model."""
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no draft: make one with hldm draft --run RUN")
    kinds = {torch.float32: "terms", torch.int64: "at", torch.uint8: "text"}
    try:
        with safe_open(path, framework="pt") as file:
            model = (file.metadata() or {}).get("model", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        expected = {"terms", "text", "at"} if autoencoder.latent_dim else {"keys", "following"}
        if tensors.keys() == expected:
            draft = ChunkDraft(model, **tensors) if autoencoder.latent_dim else TextDraft(model, **tensors)
            _check_types(draft, autoencoder, kinds)
        else:
            raise ValueError(
                f"expected {', '.join(sorted(expected))}, got {', '.join(sorted(tensors))}"[:200]
            )
    except (SafetensorError, ValueError, TypeError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"{path} is no draft of this model ({first_line(error)}): make one with hldm draft"
        ) from None
    check_draft(draft, autoencoder)
    return draft


def _check_types(draft: Draft, autoencoder: Autoencoder, kinds: dict[torch.dtype, str]) -> None:
    """Raise ValueError unless tensors have the types and sizes that the kernels read."""
    if isinstance(draft, TextDraft):
        fits = draft.keys.dtype == torch.int64 and draft.following.dtype == torch.uint8
    else:
        fits = all(getattr(draft, name).dtype == dtype for dtype, name in kinds.items())
        fits = fits and draft.terms.shape[0] == 2 * autoencoder.latent_dim + 1
    if not fits:
        raise ValueError("tensors of other types or sizes")
