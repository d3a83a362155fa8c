"""How good written text is, by judges that did not write it and need nothing from a hub.

    hldm judge --run runs/demo --judge runs/demo-twin-1 --json judge.json

Bits per character under an interpolated n-gram model of held-out text that no writer was trained on, and
under a run given as a second judge (a twin trained with another seed), always beside what gives the game
away: entropy, distinct words, repetition, known words, and copying; then BrierLM on bytes and MAUVE, which judge
distributions rather than texts. True continuations stand first.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hldm.config import GenerationConfig, changed
from hldm.evaluation.bound import evaluate_bound, held_out_windows
from hldm.evaluation.continuations import write_batch
from hldm.evaluation.metrics import TrainingText, diversity
from hldm.evaluation.prompts import choose_prompts, prompt_chunker
from hldm.evaluation.tables import Table
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.runs.doing import doing
from hldm.runs.folder import corpora_of_run, training_text_of
from hldm.runs.identity import require_shared_text
from hldm.runs.location import pipeline_of
from hldm.sources.corpora import corpus_of_file
from hldm.studies.brier import GRAM, measure_brier
from hldm.studies.mauve import load_encoder, mauve_of, passages
from hldm.text.bytes import count_characters
from hldm.text.corpus import Corpus, make_corpus

ORDER = 6  # bytes of an n-gram: on 64,000 characters, longer ones are too rare to change the figures
PLACES = 16  # of BrierLM, for each prompt: four bytes take little time, and its error is large
SPAN = 50  # characters: nobody writes so many like another by chance

# head of the table: key, format
COLUMNS: Mapping[str, tuple[str, str]] = {
    "": ("name", ""),
    "n-gram bits": ("ngram_bits", ".3f"),
    "judge bits": ("judge_bits", ".3f"),
    "entropy": ("entropy", ".2f"),
    "distinct-1": ("distinct1", ".3f"),
    "distinct-2": ("distinct2", ".3f"),
    "repetition": ("repetition", ".3f"),
    "known words": ("known_words", ".1%"),
    "copied": ("copied", ".2%"),
    "BrierLM": ("brier", ".2f"),
    "its ±": ("brier_error", ".2f"),
    "MAUVE": ("mauve", ".3f"),
    "chars/s": ("characters_per_second", ",.0f"),
}


MEANINGS = {
    "n-gram bits": "bits a character under n-grams of held-out text: near the true text's is good, below it is dull",
    "judge bits": "the same under the run that --judge names",
    "entropy": "of the words used, in bits: how varied they are",
    "distinct-1": "different words, as a share of all",
    "distinct-2": "different pairs of words, as a share of all",
    "repetition": "share of four words in a row that a text has had before",
    "known words": "words that the training text has, too",
    "copied": f"stretches of {SPAN} bytes that stand in the training text",
    "BrierLM": "how well draws of 4 bytes hit the true ones, 0 to 100: higher is better",
    "its ±": "its standard error",
    "MAUVE": "how alike written and true text are as wholes, 0 to 1: higher is better",
    "chars/s": "characters written a second, all texts together",
}


class NGram:
    """Interpolated Witten-Bell n-grams over bytes (Chen and Goodman 1998, equation 16).

    p(b | h) = (c(h b) + t(h) p(b | h')) / (c(h) + t(h)), h' a byte shorter, t(h) how many different bytes
    have followed h; below the empty history all 256 bytes are alike.
    """

    def __init__(self, text: bytes, order: int = ORDER):
        self.order = order
        self.follows: dict[bytes, Counter[int]] = defaultdict(Counter)
        for at, byte in enumerate(text):
            for length in range(min(order, at + 1)):
                self.follows[text[at - length : at]][byte] += 1

    def bits(self, text: bytes, begin: int = 0) -> float:
        """-log2 p of text[begin:], given what comes before it."""
        return sum(-math.log2(self._probability(text, at)) for at in range(begin, len(text)))

    def _probability(self, text: bytes, at: int) -> float:
        p = 1 / 256
        for length in range(min(self.order, at + 1)):
            seen = self.follows.get(text[at - length : at])
            if seen is None:
                break
            total, kinds = seen.total(), len(seen)
            p = (seen[text[at]] + kinds * p) / (total + kinds)
        return p


# the settings that are varied, one at a time, around those that the run comes with
VARIATIONS: Mapping[str, tuple[Any, ...]] = {
    "steps": (0, 1, 2, 4, 8, 16, 64),
    "scheduler": ("ancestral", "ddim", "dpm"),
    "temperature": (0.5, 0.7, 0.85, 1.0),
    "decoder_temperature": (0.0, 0.2, 0.5, 0.7, 1.0),
    "guidance": (1.0, 1.5, 2.0),
}


def judge_run(
    folder: Path,
    *,
    judge: Path | None = None,
    twin: Path | None = None,
    text: Path | None = None,
    vary: Sequence[str] = (),
    prompts: int = 48,
    max_characters: int = 400,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Judge what a run writes after held-out prompts of the test text, beside what the text says there.

    judge: a twin trained with another seed;  twin: a run whose writing is judged, too
    text: a file to judge on instead, where the run's own text is not at hand: its first half trains the n-grams, from
    its second half come prompts
    vary: names of VARIATIONS: each value in turn instead of the run's own
    Raises ValueError or OSError.
    """
    _check_request(vary, prompts, max_characters)
    pipeline = read_pipeline(pipeline_of(folder))
    if vary and pipeline.prior is None:
        raise ValueError(f"{folder} is a twin: it has no sampler to vary")
    judging = _judging_model(folder, judge, twin)
    texts = _texts_of_run(folder) if text is None else _texts_of_file(text, folder)
    chunker = prompt_chunker(pipeline.autoencoder)
    chosen = choose_prompts(texts.prompts, chunker, prompts, max_characters=max_characters)
    if not chosen:
        raise ValueError(
            f"{texts.prompts.name} has no room for a prompt and a continuation: take a longer text"
        )
    true = [prompt.continuation.encode() for prompt in chosen]
    judges, no_mauve = _judges_of(texts, judging, [prompt.text for prompt in chosen], true)
    places = choose_prompts(texts.prompts, chunker, PLACES * prompts, max_characters=GRAM)

    @doing("writing, and judging what is written")
    def write(model: HLDMPipeline, settings: GenerationConfig) -> dict[str, Any]:
        written = write_batch(model, settings, judges.prompts, max_characters=max_characters, seed=seed)
        continuations = [row.text for row in written.rows]
        brier = measure_brier(model, settings, places, seed=seed)
        return {
            **judges.judge(continuations),
            "brier": brier.value,
            "brier_error": brier.standard_error,
            "mauve": judges.mauve(continuations),
            "characters_per_second": written.characters_per_second,
        }

    # of the true text itself, MAUVE against as much of another held-out text: what chance leaves of 1
    other_text = choose_prompts(texts.other, chunker, prompts, max_characters=max_characters)
    found: dict[str, Any] = {
        "true text": {
            **judges.judge(true),
            "mauve": judges.mauve([prompt.continuation.encode() for prompt in other_text]),
        }
    }
    if twin is not None:
        say(f"judging {twin}")
        other = read_pipeline(pipeline_of(twin))
        found["twin"] = write(other, other.settings)
    say(f"judging {folder}")
    found["model"] = write(pipeline, pipeline.settings)
    for name, settings in _variations(pipeline, vary):
        say(name)
        found[name] = write(pipeline, settings)
    return {
        "run": folder.resolve().name,
        "text": "test" if text is None else str(text),
        "prompts": len(chosen),
        "max_characters": max_characters,
        "seed": seed,
        "brier_places": len(places),
        "no_mauve": no_mauve,
        "judged": found,
    }


def _check_request(vary: Sequence[str], prompts: int, max_characters: int) -> None:
    """Raise ValueError for settings that do not exist, or too little text to judge."""
    unknown = sorted(set(vary) - set(VARIATIONS))
    if unknown:
        raise ValueError(f"--vary takes {', '.join(VARIATIONS)}, got {unknown[0]!r}")
    if prompts < 1 or max_characters < SPAN:
        raise ValueError(
            f"judging needs --prompts of at least 1 and --max-characters of at least {SPAN}, "
            f"got {prompts} and {max_characters}"
        )


def _judging_model(folder: Path, judge: Path | None, twin: Path | None) -> HLDMPipeline | None:
    """The second judge of a run. Raises ValueError for one of other text, with latents, or of its own writing."""
    for other in filter(None, (judge, twin)):
        require_shared_text(folder, other)
    judging = None if judge is None else read_pipeline(pipeline_of(judge))
    if judging is not None and judging.prior is not None:
        raise ValueError(f"--judge {judge} is no twin: of a model with latents there is only a bound")
    if judge is not None and twin is not None and judge.resolve() == twin.resolve():
        raise ValueError(
            f"--judge {judge} would judge its own writing: take a twin trained with another seed"
        )
    return judging


def _variations(pipeline: HLDMPipeline, vary: Sequence[str]) -> Iterator[tuple[str, GenerationConfig]]:
    """The settings of a pipeline with one changed, each under a name such as "steps 8"."""
    settings = pipeline.settings
    has_mixture = pipeline.prior is not None and pipeline.prior.mixture is not None
    for name in vary:
        for value in VARIATIONS[name]:
            needs_mixture = (name, value) == ("steps", 0)
            if value != getattr(settings, name) and (has_mixture or not needs_mixture):
                yield f"{name} {value}", changed(settings, **{name: value})


class _Texts(NamedTuple):
    """What is judged with; no writer was trained on the first two."""

    other: Corpus  # that the n-gram model counts, and that chance is measured on
    prompts: Corpus  # that prompts are of
    training: bytes | None  # that the run was trained on; None: not at hand


def _texts_of_run(folder: Path) -> _Texts:
    corpora = corpora_of_run(folder)
    return _Texts(corpora["validation"], corpora["test"], corpora["train"].text.tobytes())


def _texts_of_file(path: Path, folder: Path) -> _Texts:
    """The halves of a file, cut between two words where it has any near the middle."""
    text = corpus_of_file(path).text.tobytes()
    middle = text.find(b" ", len(text) // 2) + 1 or len(text) // 2
    while text[middle : middle + 1] and text[middle] & 0xC0 == 0x80:  # inside a character of UTF-8
        middle += 1
    other, prompts = (make_corpus(str(path), [half]) for half in (text[:middle], text[middle:]))
    return _Texts(other, prompts, training_text_of(folder))


class _Judges(NamedTuple):
    """The judges, and the texts that are compared with."""

    ngram: NGram
    model: HLDMPipeline | None
    training: TrainingText | None
    prompts: Sequence[bytes]
    encode: Callable[[Sequence[str]], np.ndarray] | None  # of MAUVE; None: not installed
    true_vectors: np.ndarray | None  # (passages d) of the true continuations

    def mauve(self, texts: Sequence[bytes]) -> float | None:
        """Of texts against the true continuations; None where it cannot be measured."""
        if self.encode is None or self.true_vectors is None:
            return None
        vectors = _vectors(self.encode, texts)
        size = min(len(vectors), len(self.true_vectors))  # equal numbers: MAUVE depends on them
        return mauve_of(self.true_vectors[:size], vectors[:size])

    def judge(self, texts: Sequence[bytes]) -> dict[str, Any]:
        """Everything about texts that continue the prompts."""
        characters = sum(map(count_characters, texts))
        pairs = list(zip(self.prompts, texts, strict=True))
        decoded = [text.decode("utf-8", "replace") for text in texts]
        return {
            "ngram_bits": sum(self.ngram.bits(a + b, begin=len(a)) for a, b in pairs) / characters,
            "judge_bits": None if self.model is None else self._model_bits(pairs) / characters,
            **diversity(decoded),
            "known_words": None if self.training is None else self.training.known_words(decoded),
            "copied": None if self.training is None else self.training.copied_share(texts),
        }

    def _model_bits(self, pairs: Sequence[tuple[bytes, bytes]]) -> float:
        """-log2 p of the continuations under the judging run: of prompt and text less that of the prompt."""
        assert self.model is not None
        model = self.model.autoencoder.eval()
        totals = []
        for documents in ([a + b for a, b in pairs], [a for a, _ in pairs]):
            windows = held_out_windows(model, make_corpus("judged", documents))
            # the end of each document is not the text's own: what remains is what its bytes cost
            bound = evaluate_bound(model, None, windows, generator=torch.Generator())
            totals.append(bound.decoder.sum() / math.log(2))
        return float(totals[0] - totals[1])


@doing("counting n-grams of held-out text, and reading the true continuations")
def _judges_of(
    texts: _Texts, model: HLDMPipeline | None, prompts: Sequence[bytes], true: Sequence[bytes]
) -> tuple[_Judges, str]:
    """The judges of texts that continue the prompts, as true does; and why MAUVE is not among them, or ""."""
    encode, no_mauve = load_encoder()
    judges = _Judges(
        NGram(texts.other.text.tobytes()),
        model,
        None if texts.training is None else TrainingText(texts.training, SPAN),
        prompts,
        encode,
        None if encode is None else _vectors(encode, true),
    )
    return judges, no_mauve


def _vectors(encode: Callable[[Sequence[str]], np.ndarray], texts: Sequence[bytes]) -> np.ndarray:
    """A vector of each passage of texts (passages d)."""
    return encode(passages([text.decode("utf-8", "replace") for text in texts]))


def table(found: Mapping[str, Any]) -> Table:
    """What was judged, a row each; no column of what nobody judged."""
    rows = [{"name": name, **row} for name, row in found["judged"].items()]
    has = {
        head: column
        for head, column in COLUMNS.items()
        if any(row.get(column[0]) is not None for row in rows)
    }
    return Table.of_records(rows, has)
