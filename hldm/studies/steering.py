"""Guides fitted to a model's latents, and what steering by them costs, judged by a classifier that sees letters alone.

Both are fitted to the training text. Held-out text says how good they are: validation and test books together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hldm.chunking.chunker import Chunker
from hldm.chunking.reading import held_out_windows, prompt_chunker, read_windows
from hldm.evaluation.metrics import TrainingText, diversity
from hldm.evaluation.prompts import choose_prompts
from hldm.evaluation.tables import Table
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.generation.steer import Guide, Method, shapes, write_steered
from hldm.model.diffusion import alpha_sigma
from hldm.runs.files import fingerprint
from hldm.runs.folder import corpora_of_run
from hldm.runs.location import pipeline_of
from hldm.studies.attributes import PASSAGE, Attribute, Passages, attribute_of, passages_of
from hldm.studies.judge import SPAN, NGram
from hldm.studies.ngram_classifier import NGramClassifier, accuracy
from hldm.text.bytes import count_characters
from hldm.text.corpus import Corpus, Split, make_corpus

CHARACTERS = 800_000  # of training text that a guide is fitted to: about two minutes on one core
EPOCHS, BATCH, RATE, DECAY = 6, 1024, 3e-3, 1e-3  # AdamW; features have unit scale
HELD_OUT: tuple[Split, ...] = ("validation", "test")
FEWEST = 20  # passages of each value
MOST_JUDGED = 8_000  # passages that the judge is fitted to

COLUMNS = {
    "value": ("value", ""),
    "method": ("method", ""),
    "strength": ("strength", "g"),
    "judged right": ("right", ".1%"),
    "±": ("right_error", ".1%"),
    "n-gram bits": ("ngram_bits", ".3f"),
    "of unsteered": ("ratio", ".1%"),
    "known words": ("known_words", ".1%"),
    "entropy": ("entropy", ".2f"),
    "chars/s": ("characters_per_second", ",.0f"),
}
MEANINGS = {
    "judged right": "share of continuations that a classifier of letters takes for the value",
    "±": "its standard error over seeds",
    "n-gram bits": "bits a character under n-grams of held-out text, as in hldm judge",
    "of unsteered": "of what they are at the first strength",
    "entropy": "of the words used, in bits: how varied they are",
    "chars/s": "characters kept a second, all prompts together",
}


class Read(NamedTuple):
    """What a model makes of the chunks of a corpus, passage by passage."""

    passages: Passages
    before: Tensor  # (chunks w) the summary before each chunk
    after: Tensor  # (chunks w)
    latents: Tensor  # (chunks z)


@torch.no_grad()
def read_passages(pipeline: HLDMPipeline, corpus: Corpus) -> Read:
    """Read a corpus once, for any attribute."""
    windows = held_out_windows(pipeline.autoencoder, corpus)
    parts = []
    for batch, encoding in read_windows(pipeline.autoencoder, windows):
        real = batch.is_chunk
        values = (batch.chunk_index, encoding.before, encoding.after, encoding.latents)
        parts.append([x[real].cpu() for x in values])
    index, *columns = (torch.cat(column) for column in zip(*parts, strict=True))
    order = index.argsort()
    return Read(passages_of(corpus, windows.chunk_start), *(x[order].float() for x in columns))


def thinned(corpus: Corpus, characters: int) -> tuple[Corpus, np.ndarray]:
    """Every k-th document, about so much text in all, and which ones they are."""
    step = max(round(len(corpus.text) / characters), 1)
    kept = np.arange(0, len(corpus), step)
    return make_corpus(corpus.name, (corpus.document(int(each)).tobytes() for each in kept)), kept


def label_all(attribute: Attribute, passages: Passages, documents: int, split: Split) -> np.ndarray:
    """The attribute's labels of passages (passages,). Raises ValueError where a value hardly occurs in training text.

    documents: of the whole split, which passages.document counts
    """
    labels = attribute.label(passages, documents, split)
    if split == "train":
        for index, value in enumerate(attribute.values):
            if (labels == index).sum() < FEWEST:
                raise ValueError(
                    f"{attribute.name}: only {(labels == index).sum()} passages of the text are {value}, "
                    f"{FEWEST} are needed"
                )
    return labels


def _logistic(
    features: Callable[[Tensor], Tensor], labels: Tensor, values: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Weights (values f) and bias of a logistic regression, values weighing alike. features: rows (n) -> (n f)"""
    generator = torch.Generator().manual_seed(seed)
    width = features(torch.zeros(1, dtype=torch.long)).shape[1]
    weight, bias = torch.zeros(values, width, requires_grad=True), torch.zeros(values, requires_grad=True)
    balance = 1 / torch.bincount(labels, minlength=values).clamp_min(1).float()
    optimizer = torch.optim.AdamW([weight, bias], lr=RATE, weight_decay=DECAY)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            loss = F.cross_entropy(features(rows) @ weight.T + bias, labels[rows], balance)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weight.detach(), bias.detach()


@torch.no_grad()
def _components(pipeline: HLDMPipeline, before: Tensor, latents: Tensor) -> Tensor:
    """p(k | z_0 = alpha mu, h) of each chunk (n k): which component of the mixture a latent is of."""
    assert pipeline.prior is not None and pipeline.prior.mixture is not None
    mixture, gamma = pipeline.prior.mixture, torch.tensor(pipeline.prior.diffusion.gamma_0)
    alpha, _ = alpha_sigma(gamma)
    return mixture.joint(alpha * latents, gamma, mixture.log_weights(before)).softmax(dim=-1)


def fit_guide(
    pipeline: HLDMPipeline, attribute: Attribute, read: Read, labels: np.ndarray, *, seed: int = 0
) -> Guide:
    """Both classifiers of an attribute, each chunk an example with the label of its passage.

    read, labels: of training text (`read_passages`, `label_all`)
    """
    assert pipeline.prior is not None
    wanted = shapes(pipeline.autoencoder, pipeline.prior, len(attribute.values))
    label = np.where(read.passages.of_chunk >= 0, labels[read.passages.of_chunk], -1)
    rows = torch.from_numpy(np.flatnonzero(label >= 0))
    target = torch.from_numpy(label[label >= 0])
    tensors: dict[str, Tensor] = {}
    scale: dict[str, tuple[Tensor, Tensor]] = {}
    for name, known in (("after", read.after), ("next", read.before)):
        scale[name] = (known[rows].mean(dim=0), known[rows].std(dim=0).clamp_min(1e-6))

    def after(some: Tensor) -> Tensor:
        mean, deviation = scale["after"]
        return (read.after[rows[some]] - mean) / deviation

    def following(some: Tensor) -> Tensor:
        mean, deviation = scale["next"]
        before = read.before[rows[some]]
        shares = _components(pipeline, before, read.latents[rows[some]])
        return torch.cat([(before - mean) / deviation, shares], dim=-1)

    for name, features in (("after", after), ("next", following)):
        weight, bias = _logistic(features, target, len(attribute.values), seed)
        mean, deviation = scale[name]
        own = weight[:, : len(mean)] / deviation  # of features as they are
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = own.contiguous(), bias - own @ mean
        if name == "next":
            tensors["next.component"] = weight[:, len(mean) :].T.contiguous()
    assert {name: tuple(x.shape) for name, x in tensors.items()} == wanted
    model = fingerprint(pipeline.autoencoder.state_dict())
    return Guide(attribute.name, attribute.values, model, tensors, {})


def guide_accuracy(pipeline: HLDMPipeline, guide: Guide, read: Read, labels: np.ndarray) -> dict[str, float]:
    """Of both classifiers, in the mean over values: after, by the last chunk of each passage; next, by every chunk."""
    of_chunk = read.passages.of_chunk
    label = np.where(of_chunk >= 0, labels[of_chunk], -1)
    is_last = np.append(of_chunk[1:] != of_chunk[:-1], True) & (label >= 0)
    found = guide.after(read.after[torch.from_numpy(is_last)]).argmax(dim=-1).numpy()
    rows = torch.from_numpy(np.flatnonzero(label >= 0)[::8])
    before = read.before[rows]
    logits = torch.einsum("nk,nkv->nv", _components(pipeline, before, read.latents[rows]), guide.next(before))
    return {
        "after": accuracy(found, label[is_last])[1],
        "next": accuracy(logits.argmax(dim=-1).numpy(), label[rows.numpy()])[1],
    }


class Ground(NamedTuple):
    """A run, the text it was trained on and the held-out text, read: for any number of attributes."""

    pipeline: HLDMPipeline
    corpora: dict[Split, Corpus]
    read: dict[Split, Read]  # of the training text a part

    def labels(self, attribute: Attribute, split: Split) -> np.ndarray:
        """Of the passages of `read` (passages,)."""
        return label_all(attribute, self.read[split].passages, len(self.corpora[split]), split)


def read_ground(folder: Path, characters: int = CHARACTERS) -> Ground:
    """Read what guides of a run are fitted to and judged on. Raises ValueError for one without a mixture."""
    pipeline = read_pipeline(pipeline_of(folder))
    if pipeline.prior is None:
        raise ValueError(f"{folder} is a twin: it has no latents to steer by")
    shapes(pipeline.autoencoder, pipeline.prior, 2)
    corpora = corpora_of_run(folder)
    read: dict[Split, Read] = {name: read_passages(pipeline, corpora[name]) for name in HELD_OUT}
    some, kept = thinned(corpora["train"], characters)
    train = read_passages(pipeline, some)
    passages = train.passages._replace(document=kept[train.passages.document])
    return Ground(pipeline, corpora, {"train": train._replace(passages=passages), **read})


def fit(ground: Ground, name: str, *, seed: int = 0) -> Guide:
    """The guide of an attribute, and how good it is on held-out text. Raises ValueError."""
    attribute = attribute_of(name)
    guide = fit_guide(
        ground.pipeline, attribute, ground.read["train"], ground.labels(attribute, "train"), seed=seed
    )
    found = []
    for split in HELD_OUT:
        labels = ground.labels(attribute, split)
        if (labels >= 0).any():  # else nothing of it can be checked there
            found.append(guide_accuracy(ground.pipeline, guide, ground.read[split], labels))
    mean = {part: float(np.mean([each[part] for each in found])) for part in (found[0] if found else ())}
    return replace(guide, accuracy=mean)


# ---- what steering does


class Judge(NamedTuple):
    """A classifier of texts, and how often it is right of held-out text."""

    classifier: NGramClassifier
    accuracy: float  # of passages
    mean_accuracy: float  # in the mean over values


def make_judge(
    chunker: Chunker, corpora: dict[Split, Corpus], attribute: Attribute, *, seed: int = 0
) -> Judge:
    """Fitted to passages of the training text; its accuracy is that on validation and test text together."""
    texts: dict[Split, list[bytes]] = {}
    labels: dict[Split, np.ndarray] = {}
    for split, corpus in corpora.items():
        passages = passages_of(corpus, chunker.chunk_starts(list(corpus)))
        every = label_all(attribute, passages, len(corpus), split)
        kept = np.flatnonzero(every >= 0)
        if split == "train":
            kept = np.random.default_rng(seed).permutation(kept)[:MOST_JUDGED]
        texts[split], labels[split] = [passages.texts[each] for each in kept], every[kept]
    classifier = NGramClassifier(texts["train"], labels["train"], len(attribute.values), seed)
    found = [classifier.log_p(texts[split]).argmax(axis=1) for split in HELD_OUT if texts[split]]
    right = [labels[split] for split in HELD_OUT if texts[split]]
    if not found:
        raise ValueError(
            f"{attribute.name}: no passage of the held-out text has it, so no judge can be checked"
        )
    return Judge(classifier, *accuracy(np.concatenate(found), np.concatenate(right)))


def measure_steering(
    folder: Path,
    guide: Guide,
    *,
    values: Sequence[str] = (),
    method: Method = "mixture",
    strengths: Sequence[float] = (0, 0.5, 1, 2, 4),
    particles: int = 16,
    prompts: int = 24,
    max_characters: int = PASSAGE,
    seeds: int = 3,
) -> dict[str, Any]:
    """Continuations of test prompts at each strength: how many are judged to be of the value, and how good they are.

    n-gram bits: of a model of the validation text, as in `hldm judge`. Errors are over seeds.
    """
    attribute = attribute_of(guide.attribute)
    wanted = list(values) or list(guide.values)
    for value in wanted:
        guide.value(value)
    if seeds < 2 or prompts < 1:
        raise ValueError(f"measuring takes 2 seeds or more, and prompts, got {seeds} and {prompts}")
    pipeline = read_pipeline(pipeline_of(folder))
    corpora = corpora_of_run(folder)
    chunker = prompt_chunker(pipeline.autoencoder)
    judge = make_judge(chunker, corpora, attribute)
    ngram = NGram(corpora["validation"].text.tobytes())
    training = TrainingText(corpora["train"].text.tobytes(), SPAN)
    chosen = choose_prompts(corpora["test"], chunker, prompts, max_characters=max_characters)
    starts = [prompt.text for prompt in chosen]
    rows: list[dict[str, Any]] = []
    for value in wanted:
        for strength in strengths:
            found = []
            for seed in range(seeds):
                began = time.perf_counter()
                written = write_steered(
                    pipeline.autoencoder,
                    pipeline.prior,
                    starts,
                    pipeline.settings,
                    guide,
                    value,
                    strength=strength,
                    method=method,
                    particles=particles,
                    max_characters=max_characters,
                    seed=1000 * seed,
                    through_ends=True,
                )
                seconds = time.perf_counter() - began
                texts = [row.text for row in written]
                found.append(_judged(judge, guide.value(value), ngram, training, starts, texts, seconds))
            row = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
            spread = np.std([each["right"] for each in found], ddof=1) / math.sqrt(seeds)
            row |= {"right_error": float(spread), "strength": float(strength)}
            base = next((r for r in rows if r["value"] == value), row)
            rows.append(
                {"value": value, "method": method, **row, "ratio": row["ngram_bits"] / base["ngram_bits"]}
            )
    return {
        "run": folder.resolve().name,
        "attribute": guide.attribute,
        "judge_accuracy": judge.accuracy,
        "judge_mean_accuracy": judge.mean_accuracy,
        "guide_accuracy": guide.accuracy,
        "prompts": len(starts),
        "max_characters": max_characters,
        "seeds": seeds,
        "particles": particles if method == "particles" else 1,
        "steering": rows,
    }


def _judged(
    judge: Judge,
    value: int,
    ngram: NGram,
    training: TrainingText,
    prompts: Sequence[bytes],
    texts: Sequence[bytes],
    seconds: float,
) -> dict[str, float]:
    """What is said of one batch of texts."""
    characters = sum(map(count_characters, texts))
    bits = sum(ngram.bits(a + b, begin=len(a)) for a, b in zip(prompts, texts, strict=True))
    decoded = [text.decode("utf-8", "replace") for text in texts]
    return {
        "right": float((judge.classifier.log_p(texts).argmax(axis=1) == value).mean()),
        "ngram_bits": bits / characters,
        "known_words": training.known_words(decoded),
        "entropy": diversity(decoded)["entropy"],
        "characters_per_second": characters / seconds,
    }


def table(found: dict[str, Any]) -> Table:
    """A row a value and strength."""
    return Table.of_records(found["steering"], COLUMNS)
