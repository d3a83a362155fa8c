"""A memory inside the prior: built of a run's training text, and measured in bits with and without it.

    hldm memory build --run small --out MEMORY
    hldm memory measure --run small --memory MEMORY

The decoder's bits are the same with every memory. Latents cost KL(q(z_0 | x) || p(z_0 | h)) under the mixture, in
closed form but for draws of z_0, which all columns share: differences are paired.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.chunking.reading import held_out_windows, read_windows
from hldm.evaluation.parts_table import signed
from hldm.evaluation.tables import Table
from hldm.evaluation.words import split_words
from hldm.evaluation.worth import clusters_of, paired_worth
from hldm.generation.memory import Gate, Neighbours, fit_gate, query_of
from hldm.generation.memory_store import Store, new_folder, write_gates, write_store
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.generation.pyramid import Index
from hldm.generation.remembering import (
    Past,
    check_remembers,
    chunk_prints,
    document_neighbours,
    entries_of,
    stored_neighbours,
)
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import diffuse
from hldm.model.likelihood import read_chunks
from hldm.model.prior import Prior
from hldm.runs.files import fingerprint
from hldm.runs.folder import corpora_of_run, training_text_of
from hldm.runs.identity import require_shared_text
from hldm.runs.location import pipeline_of
from hldm.sources.corpora import corpus_of_file
from hldm.studies.byte_cache import Cached, fit_cache, read_cached
from hldm.text.corpus import Corpus, make_corpus
from hldm.text.windows import Windows, draw_normal

FIT_DRAWS = 2  # of z_0 a chunk: four give the same gate to two digits
TWICE_BYTES = 24_000  # of documents that are read twice over: some 150 stretches in the second readings
PHRASE = 4  # words that count as repeated
ROOMY = 1000  # bytes of a document in which repeats are looked for


class Costs(NamedTuple):
    """What a corpus costs without a memory, and what is needed to know what it costs with one."""

    windows: Windows
    past: Past
    z_0: Tensor  # (n m z) draws from each chunk's posterior
    plain: Tensor  # (n m) log p of them under the model's own mixture
    decoder: np.ndarray  # (n) nats of bytes and ends; 0 where they were not asked for
    gamma_0: float

    def latent_nats(self, log_p: Tensor) -> np.ndarray:
        """KL(q(z_0 | x) || p(z_0 | h)) of each chunk from log p of its draws (n m). (n)"""
        width = self.z_0.shape[-1]
        log_variance = -math.log1p(math.exp(-self.gamma_0))  # log sigmoid(gamma_0)
        entropy = 0.5 * width * (1 + math.log(2 * math.pi) + log_variance)
        return (-entropy - log_p.double().mean(dim=1)).numpy()


@torch.no_grad()
def read_costs(
    autoencoder: Autoencoder, prior: Prior, corpus: Corpus, *, draws: int, seed: int, decodes: bool = True
) -> Costs:
    """Read a corpus once. decodes: read its bytes from the draws, too, which takes longest."""
    mixture, gamma_0 = prior.mixture, prior.diffusion.gamma_0
    assert mixture is not None
    windows, generator = held_out_windows(autoencoder, corpus), torch.Generator().manual_seed(seed)
    n, z = windows.chunks, autoencoder.latent_dim
    query, latents = torch.zeros(n, autoencoder.settings.known_width), torch.zeros(n, z)
    z_0, plain, decoder = torch.zeros(n, draws, z), torch.zeros(n, draws), np.zeros(n)
    device = next(autoencoder.parameters()).device
    states = [autoencoder.decoder_state(windows.lanes, device) for _ in range(draws)]
    for batch, encoding in read_windows(autoencoder, windows):
        mask, mu = batch.is_chunk, encoding.latents
        chunk = batch.chunk_index[mask].cpu()
        query[chunk], latents[chunk] = query_of(encoding.before[mask]).cpu(), mu[mask].float().cpu()
        level = mu.new_full(mu.shape[:-1], gamma_0)
        log_weights = mixture.log_weights(encoding.before)
        for draw in range(draws):
            drawn = diffuse(mu, level, draw_normal(batch, mu.shape[1:], generator))
            z_0[chunk, draw] = drawn[mask].cpu()
            plain[chunk, draw] = mixture.joint(drawn, level, log_weights).logsumexp(dim=-1)[mask].cpu()
            if decodes:
                reading, states[draw] = read_chunks(autoencoder, batch, drawn, states[draw], encoding)
                decoder[chunk.numpy()] += reading.nats[mask].double().cpu().numpy() / draws
    past = Past(query, latents, *chunk_prints(windows))
    return Costs(windows, past, z_0, plain, decoder, gamma_0)


# ---- building


def build_memory(
    folder: Path, out: Path, *, text: Path | None = None, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Store a run's training text, or a file, and fit its gates on the run's validation text.

    Gates: of the text alone (`training`), of a document's own earlier chunks alone (`document`), of both.
    Raises ValueError or OSError, one line; nothing is left of what was begun.
    """
    pipeline = read_pipeline(pipeline_of(folder))
    autoencoder, prior = pipeline.autoencoder, check_remembers(pipeline.prior)
    corpora = corpora_of_run(folder)
    stored = corpora["train"] if text is None else corpus_of_file(text)
    model = fingerprint(autoencoder.state_dict())
    with new_folder(out) as new:
        write_store(new, entries_of(autoencoder, stored), model, stored.name)
        store = Store(new, model)
        say(f"{len(store):,} entries of {stored.name}, {store.bytes / 1e6:,.0f} MB; fitting the gates")
        costs = read_costs(
            autoencoder, prior, corpora["validation"], draws=FIT_DRAWS, seed=seed, decodes=False
        )
        gates = fit_gates(store, costs)
        write_gates(new, gates)
    return {"entries": len(store), "gates": {name: gate.as_dict() for name, gate in gates.items()}}


def fit_gates(store: Store | None, costs: Costs) -> dict[str, Gate]:
    """Gates of every memory there is, fitted on what this text costs."""
    found = find_neighbours(store, costs)
    return {
        name: fit_gate(_of(name, found), costs.plain, costs.z_0, costs.gamma_0) for name in modes_of(store)
    }


def modes_of(store: Store | None) -> Sequence[str]:
    """The memories that there are with a store, or without."""
    return ("document",) if store is None else ("training", "document", "both")


def find_neighbours(store: Store | None, costs: Costs, index: Index | None = None) -> dict[str, Neighbours]:
    """What is retrieved before every chunk, by source. index: of the document's own chunks."""
    found = {"document": document_neighbours(costs.past, index=index)}
    if store is not None:
        found["training"] = stored_neighbours(store, costs.windows.corpus, costs.past)
    return found


def _of(mode: str, found: Mapping[str, Neighbours]) -> dict[str, Neighbours]:
    return dict(found) if mode == "both" else {mode: found[mode]}


# ---- measuring


@torch.no_grad()
def nats_with(
    costs: Costs, store: Store | None, gates: Mapping[str, Gate], index: Index | None = None
) -> dict[str, np.ndarray]:
    """Latent nats of every chunk, "plain" without a memory and with each that has a gate. (n)"""
    found = find_neighbours(store, costs, index)
    nats = {"plain": costs.latent_nats(costs.plain)}
    for mode, gate in gates.items():
        weighed = gate.weigh({name: found[name] for name in gate.sources})
        nats[mode] = costs.latent_nats(weighed.log_density(costs.plain, costs.z_0, costs.gamma_0))
    return nats


def rows_of(
    label: str,
    costs: Costs,
    nats: Mapping[str, np.ndarray],
    counted: np.ndarray | None = None,
    of_twin: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any] | None:
    """Bits a character of the counted chunks, and what each memory saves of them; None where there are none.

    of_twin: of the same chunks (see `hldm.studies.byte_cache`)
    """
    clusters = clusters_of(costs.windows, counted)
    if not clusters.characters.sum():
        return None

    def worths(nats: Mapping[str, np.ndarray], plain: str) -> dict[str, Any]:
        sums = {name: clusters.sums(values) for name, values in nats.items()}
        whole = sums.pop("plain")
        bits = paired_worth(whole, np.zeros_like(whole), clusters.characters).bits
        return {plain: bits} | {
            mode: paired_worth(whole, values, clusters.characters).as_json() for mode, values in sums.items()
        }

    row: dict[str, Any] = {"text": label, "characters": int(clusters.characters.sum())}
    row |= worths({name: costs.decoder + values for name, values in nats.items()}, "plain")
    return row if of_twin is None else row | worths(of_twin, "twin")


def measure_memory(
    folder: Path,
    memory: str,
    *,
    twin: Path | None = None,
    text: Path | None = None,
    rare: int = 5,
    draws: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Bits with and without a memory on a run's test text or a file, on rare names, and on text that repeats itself.

    memory: folder of a store, `document`, or `pyramid`;  rare: words seen at most so often in training
    twin: a run of a twin, measured with a cache of the document's bytes, as then the run's own decoder is, too
    Raises ValueError or OSError, one line.
    """
    if draws < 1 or rare < 0:
        raise ValueError(f"draws must be at least 1 and rare at least 0, got {draws} and {rare}")
    pipeline = read_pipeline(pipeline_of(folder))
    autoencoder, prior = pipeline.autoencoder, check_remembers(pipeline.prior)
    store, gates = store_and_gates(memory, pipeline)
    cache = None if twin is None else _cache_of(folder, twin)
    own = partial(read_cached, autoencoder, gamma_0=prior.diffusion.gamma_0, seed=seed)
    own_gate, speeds = None, dict[str, dict[str, float]]()
    if cache is not None:  # what its own decoder could remember stands beside
        own_gate = fit_cache(autoencoder, corpora_of_run(folder)["validation"], prior.diffusion.gamma_0, seed)
    training: bytes | None
    if text is None:
        corpora = corpora_of_run(folder)
        corpus, training = corpora["test"], corpora["train"].text.tobytes()
    else:
        corpus, training = corpus_of_file(text), training_text_of(folder)

    def measured(read: Corpus) -> tuple[Costs, Callable[..., dict[str, Any] | None]]:
        costs = read_costs(autoencoder, prior, read, draws=draws, seed=seed)
        nats = nats_with(costs, store, gates, index_of(memory, prior))
        if cache is None or own_gate is None:
            return costs, lambda label, counted=None: rows_of(label, costs, nats, counted)
        of_twin, of_own = cache(costs.windows), own(own_gate, costs.windows)
        speeds.setdefault("twin", of_twin.speed)
        speeds.setdefault("decoder", of_own.speed)
        saved = of_own.nats["plain"] - of_own.nats["cache"]
        nats |= {"bytes": nats["plain"] - saved, "document and bytes": nats["document"] - saved}
        return costs, lambda label, counted=None: rows_of(label, costs, nats, counted, of_twin.nats)

    costs, row = measured(corpus)
    rows = [row("all of it")]
    if training is not None:
        rows += [row(label, flag) for label, flag in rare_chunks(costs.windows, training, rare).items()]
    most = most_repeating(corpus)
    if most is not None and len(corpus) > 1:
        label = f"document {most + 1}, which repeats itself most"
        rows.append(row(label, costs.past.document == most))
    twice, seconds = read_twice(corpus)
    again, row = measured(twice)
    starts = np.flatnonzero(again.windows.chunk_start) - twice.offsets[again.past.document]
    in_second = starts >= seconds[again.past.document]
    rows.append(row("documents read twice: the second time", in_second))
    return {
        "run": folder.resolve().name,
        "memory": memory,
        "twin": None if twin is None else twin.resolve().name,
        "text_of_measure": "test" if text is None else str(text),
        "draws": draws,
        "seed": seed,
        "rows": [row for row in rows if row is not None],
        "bytes_a_second": speeds,  # of CPU time, reading without and with a cache of bytes
    }


def store_and_gates(memory: str, pipeline: HLDMPipeline) -> tuple[Store | None, dict[str, Gate]]:
    """An opened store with its gates; of `document` and `pyramid` none, with the gate that comes with hldm."""
    if memory in ("document", "pyramid"):
        return None, {"document": Gate.of_document()}
    store = Store(Path(memory), fingerprint(pipeline.autoencoder.state_dict()))
    if missing := set(modes_of(store)) - set(store.gates):
        raise ValueError(f"{memory} has no gate for {', '.join(sorted(missing))}: build it again")
    return store, {mode: store.gates[mode] for mode in modes_of(store)}


def index_of(memory: str, prior: Prior) -> Index | None:
    """By which a document's own chunks are sought."""
    return Index.of(prior.hierarchy) if memory == "pyramid" else None


def _cache_of(folder: Path, twin: Path) -> Callable[[Windows], Cached]:
    """What a twin makes of windows, with a cache fitted on the run's validation text. Raises ValueError, one line."""
    require_shared_text(folder, twin)
    autoencoder = read_pipeline(pipeline_of(twin)).autoencoder
    if autoencoder.latent_dim:
        raise ValueError(f"{twin} is no twin: pass a run without latents, which reads byte by byte")
    gate = fit_cache(autoencoder, corpora_of_run(folder)["validation"])
    return partial(read_cached, autoencoder, gate)


def rare_chunks(windows: Windows, training: bytes, rare: int) -> dict[str, np.ndarray]:
    """Chunks (n) bool with a part of a word that training saw at most so often: all, names, names seen before here.

    A name begins with a capital and is not in the training text without it.
    """
    corpus = windows.corpus
    seen = Counter(match[0] for match in _WORD.finditer(training))
    flags = np.zeros((3, len(corpus.text)), bool)
    for index in range(len(corpus)):
        before: set[bytes] = set()
        for match in _WORD.finditer(corpus.document(index).tobytes()):
            word, place = match[0], slice(*(corpus.offsets[index] + at for at in match.span()))
            if seen[word] <= rare:
                is_name = word[:1].isupper() and not seen[word.lower()]
                flags[0, place] = True
                flags[1, place], flags[2, place] = is_name, is_name and word in before
            before.add(word)
    starts = np.flatnonzero(windows.chunk_start)
    labels = [f"{what} seen at most {rare} times in training" for what in ("words", "names")]
    labels.append("  names of these, from their second time in a document on")
    return {label: np.logical_or.reduceat(flag, starts) for label, flag in zip(labels, flags, strict=True)}


_WORD = re.compile(rb"[A-Za-z\x80-\xff]+")


def most_repeating(corpus: Corpus) -> int | None:
    """The document of which most phrases have been in it before, of those with some room; None without any."""
    shares = {
        index: repeated_phrases(corpus.document(index).tobytes().decode("utf-8", "replace"))
        for index in np.flatnonzero(np.diff(corpus.offsets) >= ROOMY).tolist()
    }
    return max(shares, key=lambda index: shares[index]) if shares else None


def repeated_phrases(text: str) -> float:
    """Share of the phrases of PHRASE words that are not the first of their kind."""
    words = split_words(text)
    phrases = list(zip(*(islice(words, at, None) for at in range(PHRASE)), strict=False))
    return 1 - len(set(phrases)) / max(len(phrases), 1)


def read_twice(corpus: Corpus) -> tuple[Corpus, np.ndarray]:
    """The first documents, TWICE_BYTES of them or one, each twice over; where the second reading begins in each."""
    documents: list[bytes] = []
    for document in corpus:
        if sum(map(len, documents)) >= TWICE_BYTES:
            break
        documents.append(document[:TWICE_BYTES].tobytes())
    seconds = np.array([len(document) + 1 for document in documents])
    return make_corpus(f"{corpus.name}, twice", (b" ".join([text, text]) for text in documents)), seconds


def tables(found: Mapping[str, Any]) -> list[str | Table]:
    """Bits a character without a memory, what each saves of them, and what a cache of bytes costs."""
    speeds = [
        f"a CPU core reads {speed['plain']:,.0f} bytes a second with the {name}, {speed['cache']:,.0f} with its cache"
        for name, speed in found["bytes_a_second"].items()
    ]
    return [_bits(found), *speeds]


def _bits(found: Mapping[str, Any]) -> Table:
    modes = ("training", "document", "both", "bytes", "document and bytes")
    names = {"plain": "plain", **{mode: f"saved by {mode}" for mode in modes}}
    names |= {"twin": "twin, plain", "cache": "saved by its cache"}
    columns = [name for name in names if name in found["rows"][0]]
    rows = [
        [
            row["text"],
            f"{row['characters']:,}",
            *(f"{row[name]:.4f}" if isinstance(row[name], float) else signed(row[name]) for name in columns),
        ]
        for row in found["rows"]
    ]
    return Table(["bits a character", "characters", *(names[name] for name in columns)], rows)
