"""Whether a block of chunks is summed up by more than the mean of its latents: `hldm summaries`.

    hldm summaries --run small

Every summary is made of means over the block, of functions of an entry, its place and the entries before it, so the
pyramid of `hldm.model.hierarchy` computes it. A prior for each is trained on the latents of a run's frozen stage one:
all in lockstep, on the same batches, noise and initial weights. They read latents and pyramid alone (no mixture, no
text), and few single latents, so that summaries have something to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hldm.chunking.reading import held_out_windows
from hldm.chunking.strategies import chunker_of
from hldm.config import Config, HierarchyConfig, PriorConfig, changed, config_of_run
from hldm.evaluation.parts import measure, parts_in
from hldm.evaluation.tables import Table
from hldm.evaluation.worth import Clusters, paired_worth
from hldm.generation.pipeline import read_pipeline
from hldm.model.autoencoder import Autoencoder
from hldm.model.contextualiser import Context, Contextualiser
from hldm.model.hierarchy import Entries, walk
from hldm.model.ops import take_rows
from hldm.model.prior import Prior, price_latents
from hldm.model.state import ContextState, map_carry
from hldm.runs.clock import clock_named
from hldm.runs.folder import corpora_of_run
from hldm.runs.location import pipeline_of
from hldm.text.corpus import Corpus
from hldm.text.windows import Windows
from hldm.training.objectives import cost_of
from hldm.training.optimizers import CLIP_NORM, make_average, make_optimizers, set_rates
from hldm.training.trainer import step_seed

KINDS = {
    "mean": "the mean alone",
    "variance": "variance",
    "half-distances": "half-distances of neighbours, level upon level",
    "subsets": "means of 8 fixed random halves of it",
    "pooling": "4 learned poolings",
}
SUBSETS, POOLS = 8, 4
SCORE_CAP = 5.0  # of a learned pooling: no entry weighs more than e^10 times another
LANES, WINDOW_BYTES, WINDOW = 8, 256, 8  # of training; single latents that are seen, at least
DRAWS = 4  # of noise levels a chunk, where held-out text is measured


class SummaryState(NamedTuple):
    """What a contextualiser with summaries of its own carries on."""

    context: ContextState
    recent: Tensor  # (b r-1 z) the last latents


class Summariser(Contextualiser):
    """The contextualiser of `hldm.model`, whose blocks are summed up by the mean and one of KINDS beside it."""

    def __init__(self, config: PriorConfig, hierarchy: HierarchyConfig, latent_dim: int, kind: str):
        super().__init__(config, hierarchy, latent_dim)
        self.kind, z, r = kind, latent_dim, hierarchy.ratio
        # numbers that are averaged beside the latents, and numbers that are made of their means
        self.addends, extra = {
            "mean": (0, 0),
            "variance": (z, z),
            "half-distances": ((r - 1) * z, (r - 1) * z),
            "subsets": (hierarchy.levels * SUBSETS * z, SUBSETS * z),
            "pooling": (POOLS * (z + 1), POOLS * z),
        }[kind]
        if extra:
            self.embed_extra = nn.Linear(extra, config.width, bias=False)
        if kind == "pooling":
            self.score = nn.Sequential(nn.Linear(z, 16), nn.GELU(), nn.Linear(16, POOLS))
        for level in range(1, hierarchy.levels + 1) if kind == "subsets" else ():
            size, generator = r**level, np.random.default_rng([0, level])
            halves = np.stack([generator.permutation(size) < size // 2 for _ in range(SUBSETS)], axis=1)
            self.register_buffer(f"halves_{level}", torch.from_numpy(halves).float())

    def initial_state(self, batch: int, device: torch.device | None = None) -> Any:
        """Nothing written yet."""
        state = super().initial_state(batch, device)
        b, levels, z = state.partial.shape
        wider = state._replace(partial=state.partial.new_zeros(b, levels, z + self.addends))
        return SummaryState(wider, state.partial.new_zeros(b, self.hierarchy.ratio - 1, z))

    def forward(
        self, latents: Tensor, mask: Tensor, doc_start: Tensor, state: Any, features: Tensor | None = None
    ) -> tuple[Context, Any]:
        """As `Contextualiser.forward`, from a `SummaryState` to another."""
        position = walk(doc_start, mask, state.context.written).position[:, :-1]
        extended = torch.cat([latents, self._addends(latents, state.recent, position)], dim=-1)
        context, after = super().forward(extended, mask, doc_start, state.context)
        kept = mask.sum(dim=1, keepdim=True) + torch.arange(state.recent.shape[1])
        return context, SummaryState(after, take_rows(torch.cat([state.recent, latents], dim=1), kept))

    def _addends(self, latents: Tensor, recent: Tensor, position: Tensor) -> Tensor:
        """What is averaged over a block beside its latents. (b n z), (b r-1 z), place in the document (b n)."""
        found = [latents[..., :0]]
        if self.kind == "variance":
            found.append(latents.square())
        elif self.kind == "half-distances":
            distance, n = torch.cat([recent, latents], dim=1), latents.shape[1]
            for back in range(1, self.hierarchy.ratio):
                distance = (distance[:, 1:] - distance[:, :-1]).abs() / 2
                found.append(distance[:, -n:] * (position >= back)[..., None])
        elif self.kind == "subsets":
            for level in range(1, self.hierarchy.levels + 1):
                is_in = self.get_buffer(f"halves_{level}")[position % self.hierarchy.ratio**level]  # (b n 8)
                found.append((is_in[..., None] * latents[:, :, None]).flatten(2))
        elif self.kind == "pooling":
            weight = (SCORE_CAP * (self.score(latents) / SCORE_CAP).tanh()).exp()  # (b n 4)
            found += [weight, (weight[..., None] * latents[:, :, None]).flatten(2)]
        return torch.cat(found, dim=-1)

    def _embed(self, latents: Tensor, features: Tensor, means: Tensor, blocks: Entries) -> Tensor:
        z = self.embed.in_features
        x = super()._embed(latents[..., :z], features, means[..., :z], blocks)
        if self.kind == "mean":
            return x
        extra = self.embed_extra(self._extra(means[..., :z], means[..., z:], blocks.level))
        return x + F.pad(extra, (0, 0, x.shape[1] - extra.shape[1], 0))  # blocks stand last

    def _extra(self, mean: Tensor, beside: Tensor, level: Tensor) -> Tensor:
        """What a block is summed up by beside its mean (b s e), from the means of `_addends`. level: (b s)."""
        if self.kind == "variance":
            return beside - mean.square()
        if self.kind == "subsets":
            by_level = beside.unflatten(2, (self.hierarchy.levels, -1))
            size = self.hierarchy.ratio**level
            own = (level - 1)[..., None, None].expand(-1, -1, 1, by_level.shape[-1])
            return by_level.gather(2, own)[:, :, 0] * (size / (size // 2))[..., None]
        if self.kind == "pooling":
            weight, weighted = beside.split([POOLS, beside.shape[-1] - POOLS], dim=-1)
            return (weighted.unflatten(2, (POOLS, -1)) / weight[..., None].clamp(min=1e-6)).flatten(2)
        return beside


class Trained(NamedTuple):
    """Priors by their summary, averaged over steps."""

    priors: dict[str, Prior]
    steps: int
    speed: dict[str, float]  # bytes of text a CPU second in training, without the encoder


def make_priors(config: Config, seed: int) -> dict[str, Prior]:
    """A prior for each summary, alike but for that."""
    hierarchy = changed(config.hierarchy, window=WINDOW)
    settings = changed(config.prior, reads_text=False, denoiser="", plugin="")
    found = {}
    for kind in KINDS:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            bare = changed(config.autoencoder, components=0)
            prior = Prior.from_settings(bare, settings, hierarchy, config.diffusion)
            prior.contextualiser = Summariser(settings, hierarchy, bare.latent_dim, kind)
        found[kind] = prior
    return found


def train(
    priors: Mapping[str, Prior],
    autoencoder: Autoencoder,
    corpus: Corpus,
    config: Config,
    minutes: float,
    seed: int,
) -> Trained:
    """Train all on the same batches and noise, `minutes` of a CPU core for each."""
    training, clock = config.training.of("prior"), clock_named("cpu")
    chunker = chunker_of(autoencoder)
    windows = Windows(
        corpus, chunker, lanes=LANES, window_bytes=max(WINDOW_BYTES, 2 * chunker.max_bytes), seed=seed
    )
    optimizers = {kind: make_optimizers(prior.train(), training) for kind, prior in priors.items()}
    averages = {kind: make_average(prior, training.ema_decay) for kind, prior in priors.items()}
    states = {kind: prior.initial_state(LANES) for kind, prior in priors.items()}
    encoder, step, began = autoencoder.encoder_state(LANES), 0, clock()
    seconds, read = dict.fromkeys(priors, 0.0), 0
    while (progress := (clock() - began) / (60 * minutes * len(priors))) < 1:
        batch = windows.batch(step)
        with torch.no_grad():
            encoding, encoder = autoencoder.encode(batch, encoder)
        read += batch.total_bytes
        for kind, prior in priors.items():
            started = clock()
            set_rates(optimizers[kind], training, 1.0, progress)
            generator = torch.Generator().manual_seed(step_seed(seed, step, 0))
            context, state = prior.contextualiser(
                encoding.latents, encoding.mask, encoding.doc_start, states[kind]
            )
            states[kind] = map_carry(torch.detach, state)
            paid = price_latents(prior, encoding, context, batch, generator, hide=True)
            ((cost_of(batch, paid.latent) + cost_of(batch, paid.end)) / batch.total_bytes).backward()
            prior.schedule.update(False)
            given = [p for p in prior.parameters() if p.grad is not None]
            nn.utils.clip_grad_norm_(given, CLIP_NORM)
            for optimizer in optimizers[kind]:
                optimizer.step()
                optimizer.zero_grad()
            averages[kind].update_parameters(prior)
            seconds[kind] += clock() - started
        step += 1
    averaged = {kind: cast("Prior", average.module).eval() for kind, average in averages.items()}
    return Trained(averaged, step, {kind: read / spent for kind, spent in seconds.items()})


def compare_summaries(
    folder: Path,
    *,
    minutes: float,
    seeds: int,
    chunks: int,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Bits of test latents under a prior for each summary, `seeds` times over, as JSON.

    minutes: of one CPU core, for each prior;  chunks: of the test text that are measured, about
    Raises ValueError or OSError, one line.
    """
    if seeds < 2:
        raise ValueError(f"errors are over seeds: take 2 or more, got {seeds}")
    autoencoder = read_pipeline(pipeline_of(folder)).autoencoder.requires_grad_(False)
    config = config_of_run(folder)
    if not autoencoder.latent_dim or not config.hierarchy.levels:
        raise ValueError(
            f"{folder} has no pyramid of latents: pass a latent model with hierarchy.levels of 1 or more"
        )
    corpora = corpora_of_run(folder)
    windows = held_out_windows(autoencoder, corpora["test"])
    whole: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    hidden: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    speed: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(seed, seed + seeds):
        say(f"seed {number}: {len(KINDS)} priors, {minutes:g} minutes each")
        trained = train(make_priors(config, number), autoencoder, corpora["train"], config, minutes, number)
        for kind, prior in trained.priors.items():
            speed[kind].append(trained.speed[kind])
            parts = [part for part in parts_in(autoencoder, prior) if part.name == "level-1"]
            costs = measure(autoencoder, prior, windows, parts, draws=DRAWS, seed=seed, enough=chunks)
            clusters: Clusters = costs.clusters
            whole[kind].append(clusters.sums(costs.whole[0]))
            hidden[kind].append(clusters.sums(costs.without["level-1"][0]))
    rows = [
        _row(kind, whole, hidden, clusters.characters) | {"speed": float(np.mean(speed[kind]))}
        for kind in KINDS
    ]
    asked = {"minutes": minutes, "steps": trained.steps, "seeds": seeds, "seed": seed}
    characters = int(clusters.characters.sum())
    return {"run": folder.resolve().name, "characters": characters, **asked, "compared": rows}


def _row(
    kind: str,
    whole: Mapping[str, list[np.ndarray]],
    hidden: Mapping[str, list[np.ndarray]],
    characters: np.ndarray,
) -> dict[str, Any]:
    """Bits a character of a summary, and how many more than the mean's, with the errors of text and of seeds."""
    own, mean, without = (
        np.stack(found) for found in (whole[kind], whole["mean"], hidden[kind])
    )  # (seeds k)
    row: dict[str, Any] = {"kind": kind, "summary": KINDS[kind]}
    row["bits"] = paired_worth(own.mean(axis=0), np.zeros_like(characters), characters).bits
    for name, first, second in (("more", own, mean), ("level", without, own)):
        if name == "more" and kind == "mean":
            continue
        worth = paired_worth(first.mean(axis=0), second.mean(axis=0), characters)
        each = [paired_worth(a, b, characters).bits for a, b in zip(first, second, strict=True)]
        row |= {name: worth.bits, f"{name}_text_error": worth.standard_error}
        row[f"{name}_seed_error"] = float(np.std(each, ddof=1) / len(each) ** 0.5)
    return row


COLUMNS: Mapping[str, tuple[str, str]] = {
    "beside the mean": ("kind", ""),
    "latent bits": ("bits", ".4f"),
    "more than the mean": ("more", "+.4f"),
    "± of text": ("more_text_error", ".4f"),
    "± of seeds": ("more_seed_error", ".4f"),
    "level 1 hidden": ("level", "+.4f"),
    "its ± of text": ("level_text_error", ".4f"),
    "of seeds": ("level_seed_error", ".4f"),
    "bytes/s": ("speed", ",.0f"),
}


def tables(found: Mapping[str, Any]) -> list[str | Table]:
    """What `compare_summaries` found, for `hldm.evaluation.tables.show`."""
    head = (
        f"{found['run']}: bits a character of latents on {found['characters']:,} characters, priors of "
        f"{found['minutes']:g} minutes ({found['steps']} steps) each, {found['seeds']} seeds; bytes/s: in training"
    )
    names = "\n".join(f"{kind:<15}{text}" for kind, text in KINDS.items())
    return [head, Table.of_records(found["compared"], COLUMNS), names]
