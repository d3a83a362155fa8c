"""Latents rounded to a codebook: what that does to bits, to written text, and how fast the nearest entry is found.

    hldm codebook --run small --memory MEMORY

Entries e_k are the mixture's prototypes, or k-means centres of the latents in a memory. A prior over entries is a
discrete distribution, so a rounded model has a bound of its own:

    -log p(x | h) <= E_q[-log p(x | e_k)] + KL(q(k | x) || P(k | h)),   P(k | h) = sum_c w_c(h) A_ck

with all of q on the nearest entry ("nearest"), or q(k | x) ~ exp(-alpha_0^2 |mu - e_k|^2 / 2 sigma_0^2) ("drawn").
Rounding while sampling is no density; there written text is judged. After rounding and clamping in Diffusion-LM
(arXiv 2205.14217) and noise embeddings: the noise that a step takes away is the nearest of a dictionary of noises.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.chunking.reading import held_out_windows, read_windows
from hldm.config import changed
from hldm.evaluation.metrics import TrainingText, diversity
from hldm.evaluation.prompts import choose_prompts, prompt_chunker
from hldm.evaluation.tables import Table
from hldm.evaluation.worth import clusters_of, paired_worth
from hldm.generation.chunk import Piece
from hldm.generation.memory_store import Store
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.generation.remembering import check_remembers, read_past
from hldm.generation.writer import LatentWriter, Writer, write_on
from hldm.model.diffusion import alpha_sigma, diffuse, sample
from hldm.model.likelihood import read_chunks
from hldm.model.mixture import MixturePredictor
from hldm.runs.files import fingerprint
from hldm.runs.folder import corpora_of_run
from hldm.runs.location import pipeline_of
from hldm.studies.judge import SPAN, NGram
from hldm.text.bytes import count_characters
from hldm.text.corpus import Corpus, make_corpus
from hldm.text.windows import draw_normal, draw_uniform

Snap = Literal["no", "end", "steps", "noise"]
SNAPS: tuple[Snap, ...] = ("no", "end", "steps", "noise")
SIZES = (384, 4096)  # of k-means: as many as there are prototypes, and ten times as many
SAMPLE, ROUNDS = (
    65_536,
    12,
)  # latents that k-means reads, and how often: more change the bits by less than 0.001
NOISES = 4096  # in the dictionary of noises
PLANES, RERANKED = (
    (64, 128, 256),
    1024,
)  # hyperplanes of a hash; how many of the nearest codes are compared exactly
QUERIES, NEAREST = 64, 16  # that are searched for, and how many of their neighbours should be found


class Codebook(NamedTuple):
    """Entries, and how the mixture's components share their weight among them."""

    name: str
    entries: Tensor  # (k z)
    shares: Tensor | None  # (c k) A, rows sum to 1; None: entry k is component k

    def nearest(self, mu: Tensor) -> Tensor:
        """The index of the nearest entry. (... z) -> (...)."""
        return torch.cdist(mu.reshape(-1, mu.shape[-1]), self.entries).argmin(dim=1).view(mu.shape[:-1])

    def log_prior(self, log_weights: Tensor) -> Tensor:
        """log P(k | h) from the mixture's weights. (... c) -> (... k)."""
        return (
            log_weights if self.shares is None else (log_weights.exp() @ self.shares).clamp(min=1e-30).log()
        )


def kmeans(points: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres (k z) and how many points each has (k), by Lloyd's iterations from random points (n z).

    A centre that loses its points begins again at a random one.
    """
    centres = points[torch.randperm(len(points), generator=generator)[:size]].clone()
    counts = torch.zeros(len(centres))
    for _ in range(ROUNDS):
        label = torch.cat([torch.cdist(part, centres).argmin(dim=1) for part in points.split(4096)])
        counts = torch.bincount(label, minlength=len(centres)).float()
        sums = torch.zeros_like(centres).index_add_(0, label, points)
        anywhere = points[torch.randint(len(points), (len(centres),), generator=generator)]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), anywhere)
    return centres, counts


@torch.no_grad()
def codebooks_of(mixture: MixturePredictor, latents: Tensor | None, seed: int) -> list[Codebook]:
    """The mixture's prototypes, and k-means centres of latents (n z) if there are any.

    A component shares its weight by how many latents an entry stands for and how likely the entry is under it.
    """
    found = [Codebook(f"{len(mixture.prototypes)} prototypes", mixture.prototypes, None)]
    if latents is None:
        return found
    generator = torch.Generator().manual_seed(seed)
    points = latents[torch.randperm(len(latents), generator=generator)[:SAMPLE]]
    for size in (size for size in SIZES if size <= len(points)):
        centres, counts = kmeans(points, size, generator)
        precision = (-2 * mixture.log_deviation).exp()
        square = ((mixture.prototypes[:, None] - centres).square() * precision).sum(dim=-1)
        shares = (counts.clamp(min=0.5).log() - 0.5 * square).softmax(dim=1)
        found.append(Codebook(f"{size} centres", centres, shares))
    return found


# ---- bits


@torch.no_grad()
def bits_of_codebooks(
    pipeline: HLDMPipeline, corpus: Corpus, codebooks: Sequence[Codebook], seed: int
) -> list[dict[str, Any]]:
    """Bits a character with latents as they are and rounded, paired on the same chunks."""
    autoencoder, prior = pipeline.autoencoder, check_remembers(pipeline.prior)
    mixture, gamma_0 = prior.mixture, prior.diffusion.gamma_0
    assert mixture is not None
    windows, generator = held_out_windows(autoencoder, corpus), torch.Generator().manual_seed(seed)
    alpha, sigma = (float(x) for x in alpha_sigma(torch.tensor(gamma_0)))
    names = ["as they are", *(f"{book.name}, {how}" for book in codebooks for how in ("nearest", "drawn"))]
    nats = {name: np.zeros((2, windows.chunks)) for name in names}  # latent, decoder
    device = next(autoencoder.parameters()).device
    states = {name: autoencoder.decoder_state(windows.lanes, device) for name in names}
    for batch, encoding in read_windows(autoencoder, windows):
        mask, mu = batch.is_chunk, encoding.latents
        chunk = batch.chunk_index[mask].cpu().numpy()
        log_weights = mixture.log_weights(encoding.before)
        noise = draw_normal(batch, mu.shape[1:], generator)
        u = draw_uniform(batch, mu.shape[1:2], generator)
        level = mu.new_full(mu.shape[:-1], gamma_0)
        told = {"as they are": (mixture.rate(mu, noise, gamma_0, log_weights), diffuse(mu, level, noise))}
        for book in codebooks:
            log_prior = book.log_prior(log_weights)
            near = book.nearest(mu)
            cost = -log_prior.gather(-1, near[..., None])[..., 0]
            told[f"{book.name}, nearest"] = cost, alpha * book.entries[near]
            square = torch.cdist(mu, book.entries.expand(len(mu), -1, -1)).square()
            log_q = (-0.5 * (alpha / sigma) ** 2 * square).log_softmax(dim=-1)
            drawn = torch.searchsorted(log_q.exp().cumsum(dim=-1), u[..., None]).clamp(
                max=log_q.shape[-1] - 1
            )
            cost = (log_q.exp() * (log_q - log_prior)).sum(dim=-1)
            told[f"{book.name}, drawn"] = cost, alpha * book.entries[drawn[..., 0]]
        for name, (latent, z_0) in told.items():
            reading, states[name] = read_chunks(autoencoder, batch, z_0, states[name], encoding)
            nats[name][:, chunk] = torch.stack([latent, reading.nats])[:, mask].double().cpu().numpy()
    clusters = clusters_of(windows)
    sums = {name: np.stack([clusters.sums(part) for part in parts]) for name, parts in nats.items()}
    none, whole = np.zeros_like(clusters.characters), sums["as they are"].sum(axis=0)
    rows = []
    for name, (latent, decoder) in sums.items():
        parts = {"latent": latent, "decoder": decoder, "total": latent + decoder}
        row: dict[str, Any] = {k: paired_worth(v, none, clusters.characters).bits for k, v in parts.items()}
        more = paired_worth(latent + decoder, whole, clusters.characters)
        rows.append({"name": name, **row, "more": more.bits, "standard_error": more.standard_error})
    return rows


# ---- written text


class SnappingWriter:
    """A writer whose latents are rounded: at the end, at every step, or by the noise that a step takes away."""

    def __init__(self, writer: Writer, snap: Snap, codebook: Codebook, noises: Tensor):
        assert isinstance(writer, LatentWriter)
        self.writer, self.snap, self.codebook, self.noises = writer, snap, codebook, noises
        self.calls = 0

    def write(self) -> list[Piece]:
        """Draw, round and write one chunk a row."""
        pieces = self.writer.write(self.latents())
        self.calls = self.writer.calls
        return pieces

    def latents(self) -> Tensor:
        """z_0 (b z)."""
        writer = self.writer
        if self.snap == "no":
            return writer.sample_latents()
        if self.snap == "end" or writer.plan is None:
            gamma_0 = torch.tensor(writer.prior.diffusion.gamma_0)
            alpha, _ = alpha_sigma(gamma_0)
            return alpha * self._round(writer.sample_latents() / alpha)
        shape = (len(writer.generators), writer.prior.latent_dim)
        temperature, spread = writer.settings.temperature, writer._spread if writer.draws_x0 else None
        return sample(
            self._denoise, shape, writer.plan, writer.generators, temperature, writer.device, spread
        )

    def _round(self, mu: Tensor) -> Tensor:
        return self.codebook.entries[self.codebook.nearest(mu)]

    def _denoise(self, z: Tensor, gamma: Tensor) -> Tensor:
        """The estimate rounded, or what is left of z without the nearest known noise."""
        x0 = self.writer._denoise(z, gamma)
        if self.snap == "steps":
            return self._round(x0)
        alpha, sigma = (x[:, None] for x in alpha_sigma(gamma))
        noise = (z - alpha * x0) / sigma
        known = self.noises[torch.cdist(noise, self.noises).argmin(dim=1)]
        return (z - sigma * known) / alpha


@torch.no_grad()
def judge_snaps(
    pipeline: HLDMPipeline,
    corpora: Mapping[Any, Corpus],
    codebook: Codebook,
    *,
    prompts: int,
    max_characters: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Continuations of held-out prompts with every way to round, judged by n-grams and known words."""
    prior = check_remembers(pipeline.prior)
    chunker = prompt_chunker(pipeline.autoencoder)
    chosen = choose_prompts(corpora["test"], chunker, prompts, max_characters=max_characters)
    starts = [prompt.text for prompt in chosen]
    ngram = NGram(corpora["validation"].text.tobytes())
    known = TrainingText(corpora["train"].text.tobytes(), SPAN)
    noises = torch.randn(NOISES, prior.latent_dim, generator=torch.Generator().manual_seed(seed))
    settings = changed(pipeline.settings, steps=max(pipeline.settings.steps, 1))
    rows = []
    for snap in SNAPS:

        def through(writer: Writer, texts: Sequence[bytes], snap: Snap = snap) -> Writer:
            return SnappingWriter(writer, snap, codebook, noises)

        began = time.perf_counter()
        parts = pipeline.autoencoder, prior, starts, settings
        writing = write_on(
            *parts, max_characters=max_characters, seed=seed, through_ends=True, through=through
        )
        written = [row.text for row in deque(writing, maxlen=1).pop()[0]]
        seconds = time.perf_counter() - began
        characters = sum(map(count_characters, written))
        bits = [
            ngram.bits(a + b, begin=len(a)) / count_characters(b)
            for a, b in zip(starts, written, strict=True)
        ]
        decoded = [text.decode("utf-8", "replace") for text in written]
        rows.append(
            {
                "snap": snap,
                "ngram_bits": float(np.mean(bits)),
                "standard_error": float(np.std(bits, ddof=1) / math.sqrt(len(bits)))
                if len(bits) > 1
                else None,
                "known_words": known.known_words(decoded),
                **{
                    key: value
                    for key, value in diversity(decoded).items()
                    if key in ("entropy", "repetition")
                },
                "characters_per_second": characters / seconds,
            }
        )
    return rows


# ---- hashing


def hash_codes(vectors: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """On which side of each random hyperplane (d p) vectors (n d) lie: (n p / 64) uint64 (Charikar, STOC 2002)."""
    bits = np.packbits(vectors.astype(np.float32) @ planes > 0, axis=1)
    return np.ascontiguousarray(bits).view(np.uint64)


def nearest_by_hash(
    query: np.ndarray, codes: np.ndarray, planes: np.ndarray, vectors: np.ndarray
) -> np.ndarray:
    """The NEAREST vectors to one query (d): RERANKED of least Hamming distance, then compared exactly."""
    differing = np.bitwise_count(codes ^ hash_codes(query[None], planes)).sum(axis=1, dtype=np.uint16)
    best = np.argpartition(differing, min(RERANKED, len(codes) - 1))[:RERANKED]
    best.sort()  # a memory-mapped file is read in order
    square = np.square(vectors[best].astype(np.float32) - query).sum(axis=1)
    return best[np.argsort(square)[:NEAREST]]


def time_hashing(store: Store, queries: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Recall and microseconds of exact search, of hashing, and of the store's index, one query (q d) at a time."""
    vectors, generator = np.array(store.entries.keys), np.random.default_rng(seed)
    exact = Store(store.folder, store.model, exact=True)
    truth, seconds = _timed(queries, lambda query: exact.search(query[None], None, NEAREST)[1][0])
    rows: list[dict[str, Any]] = [{"search": "exact", "alone": 1e6 * seconds, "recall": 1.0}]
    ways: dict[str, Any] = {}
    for count in PLANES:
        planes = generator.normal(size=(vectors.shape[1], count)).astype(np.float32)
        codes = hash_codes(vectors, planes)
        ways[f"{count} hyperplanes"] = lambda query, p=planes, c=codes: nearest_by_hash(query, c, p, vectors)
    if store.index is not None:
        ways["index"] = lambda query: store.search(query[None], None, NEAREST)[1][0]
    for name, way in ways.items():
        found, seconds = _timed(queries, way)
        shared = [len(np.intersect1d(a, b)) / NEAREST for a, b in zip(found, truth, strict=True)]
        rows.append({"search": name, "alone": 1e6 * seconds, "recall": float(np.mean(shared))})
    return rows


def _timed(queries: np.ndarray, search: Any) -> tuple[list[np.ndarray], float]:
    began = time.perf_counter()
    found = [search(query) for query in queries]
    return found, (time.perf_counter() - began) / len(queries)


# ---- the study


def measure_codebooks(
    folder: Path, *, memory: Path | None = None, prompts: int = 24, max_characters: int = 400, seed: int = 0
) -> dict[str, Any]:
    """Bits, written text and searches with codebooks, on a run's test text.

    memory: a store of `hldm memory build`, whose latents k-means reads and whose queries hashing searches for
    Raises ValueError or OSError, one line.
    """
    pipeline = read_pipeline(pipeline_of(folder))
    mixture = check_remembers(pipeline.prior).mixture
    assert mixture is not None
    store = None if memory is None else Store(memory, fingerprint(pipeline.autoencoder.state_dict()))
    corpora = corpora_of_run(folder)
    latents = None if store is None else torch.from_numpy(np.array(store.entries.latents))
    books = codebooks_of(mixture, latents, seed)
    judged, searched = [], []
    if prompts:
        judged = judge_snaps(
            pipeline, corpora, books[0], prompts=prompts, max_characters=max_characters, seed=seed
        )
    if store is not None:
        some = make_corpus("queries", (document.tobytes() for document in islice(corpora["test"], 2)))
        query = read_past(pipeline.autoencoder, held_out_windows(pipeline.autoencoder, some)).query
        places = torch.linspace(0, len(query) - 1, min(QUERIES, len(query))).long()
        searched = time_hashing(store, store.project(query[places]).numpy(), seed)
    return {
        "run": folder.resolve().name,
        "seed": seed,
        "codebooks": bits_of_codebooks(pipeline, corpora["test"], books, seed),
        "judged": judged,
        "searches": searched,
    }


BITS: Mapping[str, tuple[str, str]] = {
    "latents, bits a character": ("name", ""),
    "latent": ("latent", ".4f"),
    "decoder": ("decoder", ".4f"),
    "bound": ("total", ".4f"),
    "more": ("more", ".4f"),
    "±": ("standard_error", ".4f"),
}
JUDGED: Mapping[str, tuple[str, str]] = {
    "rounded while sampling": ("snap", ""),
    "n-gram bits": ("ngram_bits", ".3f"),
    "±": ("standard_error", ".3f"),
    "known words": ("known_words", ".1%"),
    "entropy": ("entropy", ".2f"),
    "repetition": ("repetition", ".3f"),
    "chars/s": ("characters_per_second", ",.0f"),
}
SEARCHED: Mapping[str, tuple[str, str]] = {
    "search": ("search", ""),
    "us a query": ("alone", ",.0f"),
    f"recall of {NEAREST}": ("recall", ".1%"),
}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """A table each of bits, of written text and of searches, if they were measured."""
    parts = (("codebooks", BITS), ("judged", JUDGED), ("searches", SEARCHED))
    return [Table.of_records(found[key], columns) for key, columns in parts if found[key]]
