"""What earlier chunks could still say of the next latent, beyond what the trunk knows: a cache over the pyramid.

    p'(k | h_i) = g(h_i) p(k | h_i) + sum_e a_e(h_i) r_e(k)

p(k | h_i) are the weights of the mixture before chunk i. An entry e is a chunk j of the same document before i, or the
mean of r, r^2, ... of them (`hldm.model.hierarchy`): its value r_e is which prototypes its latents are near, its key
the trunk's output before it, as in a continuous cache (Grave et al., arXiv 1612.04426). g and a_e are one softmax
(Merity et al., arXiv 1609.07843), so p' is a density and its rate a bound; only weights change, and the denoiser stays
in closed form.

Means may also serve as an index alone: of the blocks of r chunks those with the mean key most like the query are read
in full (`blocks`), as in sparse attention that selects (arXiv 2502.11089).

The model is frozen. The few numbers of the cache are fitted on the validation split, since a trunk knows too much of
the text that it was trained on. What the cache is worth is measured on the test split, with every level hidden in
turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hldm.config import Documents, HierarchyConfig, changed, load_config
from hldm.evaluation.bound import held_out_windows
from hldm.evaluation.reconstruction import read_windows
from hldm.evaluation.tables import Table
from hldm.evaluation.worth import Clusters, Worth, clusters_of, paired_worth
from hldm.generation.pipeline import read_pipeline
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import diffuse
from hldm.model.hierarchy import Entries, Walk, distance_in_blocks, still_needed, summaries, visible, walk
from hldm.model.mixture import MixturePredictor
from hldm.model.ops import take_rows
from hldm.model.state import map_carry
from hldm.runs.folder import corpora_of_run
from hldm.runs.location import pipeline_of
from hldm.sources.corpora import load_corpora
from hldm.text.corpus import Corpus, Split

CHUNKS = 256  # a window, and a step of the fit
STEPS = 100  # of the fit
RATES = (0.02, 0.2)  # of the fit: of what has a number a feature, of the others
SHARP = -12.0  # gamma at which a latent is shared out among prototypes: hardly any noise
NEAREST = 24  # chunks that are always read in full
DISTANCES = 40  # of which a bias is learned, two to a doubling

Hides = Callable[[Tensor, Tensor], Tensor]  # level (1 1 c), distance in blocks (1 n c) -> which are not seen


class Chunks(NamedTuple):
    """What a frozen model makes of the chunks of a split, all documents in a row."""

    key: Tensor  # (1 n w) what is known before each, normalised
    shares: Tensor  # (1 n k) of the prototypes in its latent
    log_p: Tensor  # (1 n) of z_0 under the mixture
    log_component: Tensor  # (1 n k) of z_0 under each component
    opens: Tensor  # (1 n) bool, the first of a document
    clusters: Clusters


class CacheState(NamedTuple):
    """What is kept of the chunks before a window."""

    values: Tensor  # (1 c w+k) keys and shares
    entries: Entries
    written: Tensor  # (1) chunks of the open document
    partial: Tensor  # (1 levels w+k) sums of the open blocks


class PyramidCache(nn.Module):
    """Temperatures by level, a weight for each feature of a query, a bias by level and distance, and the gate."""

    def __init__(self, width: int, hierarchy: HierarchyConfig, blocks: int = 0):
        """blocks: that are read in full, beside the NEAREST chunks; 0: all that the hierarchy shows"""
        super().__init__()
        self.hierarchy, self.blocks = hierarchy, blocks
        self.temperature = nn.Parameter(torch.full((hierarchy.levels + 1,), 10.0))
        self.scale = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(hierarchy.levels + 1, DISTANCES))
        self.gate = nn.Linear(width, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 4.0)

    def initial_state(self, chunks: Chunks) -> CacheState:
        """Nothing read."""
        c, numbers = self.hierarchy.capacity, chunks.key.shape[2] + chunks.shares.shape[2]
        empty = torch.zeros(1, c, dtype=torch.long)
        return CacheState(
            torch.zeros(1, c, numbers),
            Entries(empty, empty, empty - 1),
            torch.zeros(1, dtype=torch.long),
            torch.zeros(1, self.hierarchy.levels, numbers),
        )

    def forward(
        self,
        chunks: Chunks,
        part: slice,
        state: CacheState,
        hides: Hides | None = None,
    ) -> tuple[Tensor, CacheState]:
        """log p'(z_0) - log p(z_0) of the chunks of a window (1 n), in nats, and the state after it."""
        key, shares, opens = chunks.key[:, part], chunks.shares[:, part], chunks.opens[:, part]
        n, width, mask = opens.shape[1], key.shape[2], torch.ones_like(opens)
        own = torch.cat([F.normalize(key, dim=-1), shares], dim=-1)
        steps = walk(opens, mask, state.written)
        means, blocks, partial = summaries(own, mask, steps, state.partial, self.hierarchy)
        position, document = steps.position[:, :n], steps.document[:, :n]
        new = Entries(torch.zeros_like(position), position + 1, document)
        entries = Entries(
            *(torch.cat(parts, dim=1) for parts in zip(state.entries, new, blocks, strict=True))
        )
        values = torch.cat([state.values, own, means], dim=1)
        sees = visible(position, document, entries, self.hierarchy) & (entries.document >= 0)[:, None]
        away = distance_in_blocks(position, entries, self.hierarchy)
        if hides is not None:
            sees &= ~hides(entries.level[:, None], away)

        keys, of_entries = values.split([width, shares.shape[2]], dim=-1)
        likeness = F.normalize(key * self.scale.square(), dim=-1) @ keys.mT
        # The mean stands for r^l chunks.
        size = (self.hierarchy.ratio**entries.level).float().log()[:, None]
        if self.blocks:
            sees &= self._in_chosen_blocks(likeness, sees, entries) | (away < NEAREST)
        distance = (2 * (away + 1).float().log2()).long()
        bias = self.bias[entries.level[:, None].expand_as(distance), distance.clamp(max=DISTANCES - 1)]
        temperature = self.temperature[entries.level][:, None]
        logits = temperature * (likeness - 1) + size + bias
        weights = torch.cat([self.gate(key), logits.masked_fill(~sees, -1e9)], dim=-1).log_softmax(dim=-1)
        cached = weights[..., 1:].exp() @ of_entries  # (1 n k)
        log_cache = (cached.clamp(min=1e-12).log() + chunks.log_component[:, part]).logsumexp(dim=-1)
        log_p = chunks.log_p[:, part]
        gain = torch.logaddexp(weights[..., 0] + log_p, log_cache) - log_p
        return gain, self._keep(values, entries, steps, partial)

    def _in_chosen_blocks(self, likeness: Tensor, sees: Tensor, entries: Entries) -> Tensor:
        """Which single chunks lie in the whole blocks of r that are most like the query, by their mean key. (1 n c).

        The likeness of a mean is the mean of likenesses.
        """
        ratio = self.hierarchy.ratio
        number = (entries.end[0] - 1).div(ratio, rounding_mode="floor")
        pairs = torch.stack([entries.document[0], number, entries.level[0]])
        _, block = torch.unique(pairs, dim=1, return_inverse=True)
        member = F.one_hot(block).float()  # (c blocks)
        is_whole = (sees.float() @ member) > ratio - 0.5
        score = ((likeness * sees) @ member / ratio).masked_fill(~is_whole, -math.inf)
        best = score.topk(min(self.blocks, score.shape[-1]), dim=-1).indices
        is_chosen = torch.zeros_like(is_whole).scatter(-1, best, True) & is_whole
        return (is_chosen.float() @ member.T) > 0.5

    def _keep(self, values: Tensor, entries: Entries, steps: Walk, partial: Tensor) -> CacheState:
        """The entries that may still be seen."""
        needed = still_needed(steps.written, steps.open_document, entries, self.hierarchy)
        needed &= entries.document >= 0
        order = (~needed).to(torch.int8).argsort(dim=1, stable=True)[:, : self.hierarchy.capacity]
        kept = needed.gather(1, order)
        where = Entries(
            entries.level.gather(1, order) * kept,
            entries.end.gather(1, order) * kept,
            torch.where(kept, 0, -1),
        )
        return CacheState(take_rows(values, order) * kept[..., None], where, steps.written, partial)


@torch.no_grad()
def read_corpus(
    autoencoder: Autoencoder, mixture: MixturePredictor, gamma_0: float, corpus: Corpus
) -> Chunks:
    """Every chunk of a corpus as the frozen model sees it, z_0 drawn once."""
    windows = held_out_windows(autoencoder, corpus)
    n, z = windows.chunks, autoencoder.latent_dim
    known, latents = torch.zeros(n, autoencoder.settings.known_width), torch.zeros(n, z)
    opens = torch.zeros(n, dtype=torch.bool)
    for batch, encoding in read_windows(autoencoder, windows):
        index, mask = batch.chunk_index[batch.is_chunk], encoding.mask
        known[index], latents[index] = encoding.before[mask], encoding.latents[mask]
        opens[index] = encoding.doc_start[mask]
    noise = torch.randn(n, z, generator=torch.Generator().manual_seed(0))
    z_0 = diffuse(latents, torch.full((n,), gamma_0), noise)
    found = []
    for part in torch.arange(n).split(CHUNKS):
        even = torch.zeros(len(part), len(mixture.prototypes))
        component = mixture.joint(z_0[part], torch.full((len(part),), gamma_0), even)
        shares = mixture.joint(latents[part], torch.full((len(part),), SHARP), even).softmax(dim=-1)
        log_p = (mixture.log_weights(known[part]) + component).logsumexp(dim=-1)
        found.append((shares, log_p, component))
    shares, log_p, component = (torch.cat(parts)[None] for parts in zip(*found, strict=True))
    key = F.layer_norm(known, known.shape[-1:])[None]
    return Chunks(key, shares, log_p, component, opens[None], clusters_of(windows))


def fit(cache: PyramidCache, chunks: Chunks) -> None:
    """Maximise the gain on a split, in order, again and again."""
    few = [cache.temperature, cache.bias, cache.gate.bias]
    many = [cache.scale, cache.gate.weight]
    groups: list[dict[str, Any]] = [{"params": many}, {"params": few}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    parts = _parts(chunks)
    for step in range(STEPS):
        if step % len(parts) == 0:
            state = cache.initial_state(chunks)
        for group, rate in zip(optimizer.param_groups, RATES, strict=True):
            group["lr"] = rate * (1 - step / STEPS)
        gain, state = cache(chunks, parts[step % len(parts)], state)
        optimizer.zero_grad()
        (-gain.mean()).backward()
        optimizer.step()
        state = map_carry(torch.detach, state)


@torch.no_grad()
def gains(cache: PyramidCache, chunks: Chunks, hides: Hides | None = None) -> np.ndarray:
    """Nats that the cache saves at every chunk (n)."""
    state, found = cache.initial_state(chunks), []
    for part in _parts(chunks):
        gain, state = cache(chunks, part, state, hides)
        found.append(gain[0])
    return torch.cat(found).double().numpy()


def _parts(chunks: Chunks) -> list[slice]:
    n = chunks.log_p.shape[1]
    return [slice(first, min(first + CHUNKS, n)) for first in range(0, n, CHUNKS)]


def far_context(
    folder: Path,
    *,
    documents: Documents | None = None,
    levels: int = 3,
    window: int = NEAREST,
    blocks: int = 0,
) -> dict[str, Any]:
    """What a cache over the pyramid saves on the test split of a run's text, and what each level does, as JSON.

    documents: of the built-in text, in place of the run's own;  levels, window: of the pyramid
    blocks: of single chunks that are read in full, chosen by their means; 0: all
    Raises ValueError or OSError, one line.
    """
    if blocks and levels:
        raise ValueError(
            f"--blocks chooses among single chunks: pass --levels 0 with it, got levels {levels}"
        )
    pipeline = read_pipeline(pipeline_of(folder))
    if pipeline.prior is None or pipeline.prior.mixture is None:
        raise ValueError(
            f"{folder} has no mixture over latents: pass a latent model with autoencoder.components"
        )
    autoencoder, prior = pipeline.autoencoder.eval(), pipeline.prior.eval()
    mixture, gamma_0 = prior.mixture, prior.diffusion.gamma_0
    assert mixture is not None
    corpora = _corpora(folder, documents)
    fitted, held = (
        read_corpus(autoencoder, mixture, gamma_0, corpora[split]) for split in ("validation", "test")
    )
    hierarchy = changed(prior.hierarchy, levels=levels, window=window)
    cache = PyramidCache(fitted.key.shape[2], hierarchy, blocks)
    fit(cache, fitted)
    whole = gains(cache, held)
    worths = {"cache": _worth(whole, held.clusters)}
    for name, hides in _hidden(levels, window).items():
        worths[name] = _worth(whole - gains(cache, held, hides), held.clusters)
    return {
        "run": folder.resolve().name,
        "documents": documents or "as trained",
        "levels": levels,
        "ratio": hierarchy.ratio,
        "window": window,
        "blocks": blocks,
        "chunks": len(whole),
        "characters": int(held.clusters.characters.sum()),
        "worth": {name: worth.as_json() for name, worth in worths.items()},
    }


def _is_of_level(hidden: int, level: Tensor, away: Tensor) -> Tensor:
    return (level == hidden).expand_as(away)


def _hidden(levels: int, window: int) -> dict[str, Hides]:
    """What is hidden, by name."""
    found: dict[str, Hides] = {}
    if window > NEAREST:
        found["beyond"] = lambda level, away: (level > 0) | (away >= NEAREST)
    for hidden in range(1, levels + 1):
        found[f"level-{hidden}"] = partial(_is_of_level, hidden)
    if levels:
        found["levels"] = lambda level, away: (level > 0).expand_as(away)
    return found


def _worth(saved: np.ndarray, clusters: Clusters) -> Worth:
    nats = clusters.sums(saved)
    return paired_worth(nats, np.zeros_like(nats), clusters.characters)


def _corpora(folder: Path, documents: Documents | None) -> Mapping[Split, Corpus]:
    corpora = corpora_of_run(folder)
    if documents is None:
        return corpora
    data = load_config(folder / "autoencoder" / "config.yaml").data
    if data.path or data.dataset:
        raise ValueError(f"{folder} was trained on text of its own: --documents is of the built-in text")
    return load_corpora(changed(data, documents=documents))


def table(found: Mapping[str, Any]) -> Table:
    """A row for the cache, and one for whatever was hidden from it."""
    window, ratio, blocks = found["window"], found["ratio"], found["blocks"]
    names = {
        "cache": f"cache of at least {window:,} single chunks" + (", and means" if found["levels"] else ""),
        "beyond": f"  all beyond the nearest {NEAREST}"
        + (f": {blocks} blocks of {ratio} at a time" if blocks else ""),
        "levels": "  all means",
    }
    names |= {
        f"level-{level}": f"  level {level}, means of {ratio**level:,} chunks"
        for level in range(1, found["levels"] + 1)
    }
    rows = []
    for name, worth in found["worth"].items():
        error = worth["standard_error"]  # None: of a single stretch of text
        rows.append([names[name], f"{worth['bits']:.4f}" + ("" if error is None else f" ± {error:.4f}")])
    return Table(["saved, bits per character", "worth"], rows)
