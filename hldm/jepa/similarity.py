"""What latents mean, measured: verses found across translations, probes, graded sentence pairs; a row a representation.

The verses are those of the eight books that no training text holds. Raw, centred and whitened cosines stand side by
side, and TF-IDF and the untrained encoder in the same table: whitening alone is worth more than most training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.config import ConfigError
from hldm.evaluation.tables import Table
from hldm.jepa.meaning import Frame, frames, nearest_neighbours, pair_features, probe, retrieve, spearman
from hldm.jepa.representations import (
    Source,
    jepa_source,
    stage_one_source,
    transformer_sources,
    untrained_source,
)
from hldm.jepa.texts import typing_errors
from hldm.jepa.tfidf import characters_3_to_5, cosines, lower_words, tfidf
from hldm.jepa.train import settings_of
from hldm.jepa.transformer import folder_of
from hldm.jepa.translations import genre_of, installed, is_held_out, verses_of
from hldm.model.vitals import effective_rank
from hldm.runs.doing import doing
from hldm.runs.location import find_model

FITTED = 0.8  # of the sample of training verses: probes are fitted on it, and tested on the rest
GRADED, TYPOS = (
    500,
    0.1,
)  # verses whose neighbours are graded by nearness; letters touched in their altered copy
STS_PARTS = 3  # columns of a line: score from 0 to 5, and two sentences
Terms = Callable[[str], list[str]]
TERMS: dict[str, Terms] = {
    "TF-IDF characters": characters_3_to_5,
    "TF-IDF words": lower_words,
}


class Verses(NamedTuple):
    """What every row is measured on."""

    numbers: list[int]  # of the held-out verses, in order
    texts: dict[str, list[str]]  # of each translation, the built-in one first
    sample: list[int]  # of training verses, for whitening and probes
    sample_texts: list[str]
    graded: np.ndarray  # (m 5) places of a verse, the next, one of its chapter, of its book, of another book
    altered: list[str]  # the m verses with typing errors


class Pairs(NamedTuple):
    """One file of graded sentence pairs."""

    name: str
    scores: np.ndarray
    first: list[str]
    second: list[str]


def choose_verses(translations: Sequence[str], sample: int, seed: int = 0) -> Verses:
    """Held-out verses that all the translations have, and a random sample of the built-in training verses."""
    built_in = verses_of("bbe")
    others = {name: verses_of(name) for name in translations}
    numbers = [n for n in sorted(built_in) if is_held_out(n) and all(n in other for other in others.values())]
    texts = {"bbe": [built_in[n] for n in numbers]}
    texts |= {name: [other[n] for n in numbers] for name, other in others.items()}
    training = [n for n in sorted(built_in) if not is_held_out(n)]
    chosen = np.random.default_rng(seed).choice(len(training), min(sample, len(training)), replace=False)
    sampled = [training[index] for index in chosen]
    graded = draw_graded(numbers, seed)
    rng = np.random.default_rng(seed)
    altered = [typing_errors(texts["bbe"][at].encode(), TYPOS, rng).decode() for at in graded[:, 0]]
    return Verses(numbers, texts, sampled, [built_in[n] for n in sampled], graded, altered)


def draw_graded(numbers: Sequence[int], seed: int = 0) -> np.ndarray:
    """Places (m 5) of verses: one, the next, another of its chapter, of another chapter of its book, of another book.

    numbers: of all verses, BBCCCVVV in order;  m: GRADED, or as many verses as have all the others
    """
    rng = np.random.default_rng(seed)
    number = np.array(numbers)
    book, chapter = number // 1_000_000, number // 1000
    rows: list[list[int]] = []
    for at in rng.permutation(len(number)):
        kinds = (
            number == number[at] + 1,
            (chapter == chapter[at]) & (np.abs(number - number[at]) > 1),
            (book == book[at]) & (chapter != chapter[at]),
            book != book[at],
        )
        if len(rows) < GRADED and all(kind.any() for kind in kinds):
            rows.append([int(at), *(int(rng.choice(np.flatnonzero(kind))) for kind in kinds)])
    return np.array(rows).reshape(-1, 5)


def read_pairs(folder: Path) -> list[Pairs]:
    """Every .tsv of a folder: score, tab, sentence, tab, sentence, a pair a line.

    Raises FileNotFoundError for a folder without any, ValueError for a line that is no pair.
    """
    paths = sorted(folder.glob("*.tsv"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no .tsv of sentence pairs: score, sentence, sentence with tabs between"
        )
    found = []
    for path in paths:
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            parts = line.split("\t")
            try:
                score = float(parts[0])
            except ValueError:
                score = math.nan
            if (
                len(parts) != STS_PARTS
                or not math.isfinite(score)
                or not (parts[1].strip() and parts[2].strip())
            ):
                raise ValueError(
                    f"{path}:{number}: expected a score and two sentences with tabs between, got {line[:60]!r}"
                )
            rows.append((score, parts[1], parts[2]))
        if len(rows) < 2:
            raise ValueError(f"{path} holds {len(rows)} pairs: a correlation needs two")
        scores, first, second = zip(*rows, strict=True)
        found.append(Pairs(path.stem, np.array(scores), list(first), list(second)))
    return found


def sources_of(runs: Sequence[Path]) -> list[Source]:
    """The rows of runs: encoders of the family with their average, before them the untrained; or stage one.

    Raises FileNotFoundError for a folder that is neither.
    """
    found: list[Source] = []
    untrained: set[str] = set()
    for run in runs:
        if (run / "jepa" / "model").is_dir():
            config = settings_of(run)
            if folder := folder_of(config):
                found += transformer_sources(run, folder)
                continue
            shape = repr((config.encoder, config.vector, config.chunking))
            if shape not in untrained and not config.chunking.needs_segmenter:
                untrained.add(shape)
                found.append(untrained_source(config))
            found.append(jepa_source(run))
            if (run / "jepa" / "target").is_dir():
                found.append(jepa_source(run, "target"))
        else:
            found.append(stage_one_source(find_model(run)))
    return found


def measure(
    sources: Iterable[Source],
    verses: Verses,
    sts: Sequence[Pairs] = (),
    say: Callable[[str], None] = lambda line: None,
    terms: Mapping[str, Terms] = TERMS,
) -> list[dict[str, Any]]:
    """A record for TF-IDF of each kind of terms, then for each kind of vectors of each source; nan becomes None."""
    if len(verses.sample) < 10:
        raise ConfigError(f"--verses must be at least 10, got {len(verses.sample)}")
    records = []
    for name, split in terms.items():
        say(f"measuring {name}")
        with doing(f"measuring {name}"):
            records.append(_measure_terms(name, split, verses, sts))
    for source in sources:
        say(f"measuring {source.name}")
        texts = [text for part in verses.texts.values() for text in part] + verses.sample_texts
        texts += verses.altered
        texts += [text for pairs in sts for text in (*pairs.first, *pairs.second)]
        with doing(f"measuring {source.name}"):
            for kind, vectors in source.encode(texts).items():
                records.append({"source": source.name, "kind": kind} | _measure_vectors(vectors, verses, sts))
    return [without_nan(record) for record in records]


def without_nan(found: Any) -> Any:
    """The same with None for nan, which JSON has not: collapsed vectors have no correlation with anything."""
    if isinstance(found, dict):
        return {key: without_nan(value) for key, value in found.items()}
    return None if isinstance(found, float) and math.isnan(found) else found


def _measure_terms(name: str, terms: Terms, verses: Verses, sts: Sequence[Pairs]) -> dict[str, Any]:
    built_in, *others = verses.texts
    found = {
        other: {
            "raw": retrieve(cosines(*tfidf(terms, verses.texts[built_in], verses.texts[other])))._asdict()
        }
        for other in others
    }

    def compare(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        a, b = tfidf(terms, first, second)
        return torch.sparse.sum(a * b, dim=1).to_dense().numpy()

    by_place = np.array(verses.texts[built_in], dtype=object)
    anchors = list(by_place[verses.graded[:, 0]])
    near = [
        anchors,
        verses.altered,
        list(np.array(verses.texts[others[0]], dtype=object)[verses.graded[:, 0]]),
    ]
    near += [list(column) for column in by_place[verses.graded[:, 1:]].T]
    graded = nearness(np.stack([compare(anchors, texts) for texts in near], axis=1))
    correlations = {
        pairs.name: {"raw": spearman(compare(pairs.first, pairs.second), pairs.scores)} for pairs in sts
    }
    return {"source": name, "kind": "", "retrieval": found, "graded": {"raw": graded}, "sts": correlations}


def nearness(cosine: np.ndarray) -> float:
    """Mean rank correlation of cosines (m 7) with how near the texts of a row are to its verse.

    Itself, altered, translated, the next verse, one of its chapter, of its book, of another book.
    """
    grade = np.arange(cosine.shape[1])[::-1]
    found = [spearman(row, grade) for row in cosine]
    return float(np.nanmean(found)) if np.isfinite(found).any() else math.nan


def _measure_vectors(vectors: Tensor, verses: Verses, sts: Sequence[Pairs]) -> dict[str, Any]:
    """vectors: of the verses, translation by translation, then of the sample, then of the pairs."""
    k = len(verses.numbers)
    sizes = [k] * len(verses.texts) + [len(verses.sample), len(verses.altered)]
    parts = vectors.split(sizes + [2 * len(pairs.first) for pairs in sts])
    built_in, *others = parts[: len(verses.texts)]
    sample, altered, *graded_pairs = parts[len(verses.texts) :]
    seen_from = frames(sample)
    place = torch.from_numpy(verses.graded)

    def retrieval(other: Tensor, frame: Frame) -> dict[str, float]:
        return retrieve(frame(built_in) @ frame(other).T)._asdict()

    def graded(frame: Frame) -> float:
        verse = frame(built_in[place[:, 0]])
        near = [verse, frame(altered), frame(others[0][place[:, 0]])]
        near += [frame(built_in[column]) for column in place[:, 1:].T]
        return nearness(torch.stack([(verse * other).sum(dim=1) for other in near], dim=1).numpy())

    correlations = {}
    for pairs, part in zip(sts, graded_pairs, strict=True):
        first, second = part.split(len(pairs.first))
        correlations[pairs.name] = {
            name: spearman((frame(first) * frame(second)).sum(dim=1).numpy(), pairs.scores)
            for name, frame in seen_from.items()
        }
    return {
        "dimensions": vectors.shape[1],
        "rank": effective_rank(built_in),
        "retrieval": {
            name: {at: retrieval(other, frame) for at, frame in seen_from.items()}
            for name, other in zip(list(verses.texts)[1:], others, strict=True)
        },
        "graded": {name: graded(frame) for name, frame in seen_from.items()},
        "probes": _probes(sample, seen_from["whitened"], built_in, verses),
        "sts": correlations,
    }


def _probes(sample: Tensor, whitened: Frame, held_out: Tensor, verses: Verses) -> dict[str, float]:
    """Book and genre of training verses; whether a verse is the next one, on held-out books."""
    cut = round(FITTED * len(sample))
    labels = {
        "book": torch.tensor([number // 1_000_000 for number in verses.sample]),
        "genre": torch.tensor([genre_of(number) for number in verses.sample]),
    }
    found = {
        name: probe(sample[:cut], label[:cut], sample[cut:], label[cut:]) for name, label in labels.items()
    }
    seen = whitened(sample)
    book = labels["book"]
    found["book_nearest"] = nearest_neighbours(seen[:cut], book[:cut], seen[cut:], book[cut:])
    return found | {"next_verse": _next_verse(held_out, verses.numbers)}


def _next_verse(vectors: Tensor, numbers: Sequence[int], seed: int = 0) -> float:
    """Accuracy, chance 1/2: the verse after, or another of the same chapter. Two folds by books.

    vectors: (k z) of verses with these numbers.
    """
    draw = np.random.default_rng(seed)
    place = {number: index for index, number in enumerate(numbers)}
    chapters: dict[int, list[int]] = {}
    for number in numbers:
        chapters.setdefault(number // 1000, []).append(number)
    rows: list[tuple[int, int, int, int]] = []  # verse, other, label, book
    for number in numbers:
        others = [n for n in chapters[number // 1000] if n not in (number, number + 1)]
        if number + 1 in place and others:
            other = others[draw.integers(len(others))]
            book = number // 1_000_000
            rows += [(place[number], place[number + 1], 1, book), (place[number], place[other], 0, book)]
    first, second, label, books = torch.tensor(rows).T
    features = pair_features(vectors[first], vectors[second])
    in_fold = torch.isin(books, books.unique()[::2])
    scores = [
        probe(features[~fold], label[~fold], features[fold], label[fold]) for fold in (in_fold, ~in_fold)
    ]
    return sum(scores) / 2


def meaning_of(run: Path, verses: int = 2000) -> dict[str, Any]:
    """Of a run of stage one, or a twin, by kind of vectors: verses found, and books by neighbours; TF-IDF beside them.

    Of the last translation that is installed: Young's Literal, or the American Standard. By whitened cosine.
    """
    chosen = choose_verses([name for name in ("asv", "ylt") if name in installed()][-1:], verses)
    other = list(chosen.texts)[-1]
    tfidf, *records = measure([stage_one_source(run)], chosen, terms=dict([next(iter(TERMS.items()))]))
    found: dict[str, Any] = {"translation": other, "verses": len(chosen.numbers)}
    found["tfidf"] = tfidf["retrieval"][other]["raw"]
    for record in records:
        nearest = record["probes"]["book_nearest"]
        found[record["kind"]] = record["retrieval"][other]["whitened"] | {"book_nearest": nearest}
    return found


LEGEND = """\
rank            independent directions in which vectors vary
NAME raw ...    verses whose nearest vector in that translation is the same verse: vectors as they are, less their mean
                (centred), with the same spread in every direction (whitened)
MRR             mean of 1 / place of the right verse, in the last translation
graded          whether vectors order texts by how near they are to a verse, 1 at best
book, genre     accuracy of a linear probe; next: of one that tells the following verse from another
5-NN            accuracy of the book that most of the five nearest verses of training books are of
STS             correlation with human grades of sentence pairs (--sts)"""


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    """Recall@1 of every translation by raw, centred and whitened cosine; probes; mean correlation with the pairs."""
    translations = list(records[0]["retrieval"]) if records else []
    heads = ["representation", "rank"]
    heads += [f"{name} {at}" for name in translations for at in ("raw", "centred", "whitened")]
    heads += ["MRR", "graded", "book", "book 5-NN", "genre", "next", "STS raw", "STS whitened"]

    def cell(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    def correlation(record: dict[str, Any], at: str) -> float | None:
        values = [by_frame[at] for by_frame in record["sts"].values() if by_frame.get(at) is not None]
        return sum(values) / len(values) if values else None

    rows = []
    for record in records:
        found = record["retrieval"]
        probes = record.get("probes", {})
        row = [f"{record['source']} {record['kind']}".strip(), cell(record.get("rank"), ".1f")]
        for name in translations:
            row += [cell(found[name].get(at, {}).get("recall_1")) for at in ("raw", "centred", "whitened")]
        best = found[translations[-1]]
        row.append(cell(best.get("whitened", best["raw"])["mrr"]))
        row.append(cell(record["graded"].get("whitened", record["graded"]["raw"])))
        row += [cell(probes.get(name)) for name in ("book", "book_nearest", "genre", "next_verse")]
        row += [cell(correlation(record, at)) for at in ("raw", "whitened")]
        rows.append(row)
    return Table(heads, rows)
