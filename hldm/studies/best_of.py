"""Whether several candidates and a rule to choose by write better text than single draws: `hldm candidates`.

    hldm candidates --run small --twin small-twin --json candidates.json

Selection narrows what is written, so a text that is easier for a judge proves nothing where its words vary less. Every
rule is therefore written at several decoder temperatures, the single draws at more of them, entropy stands beside each,
and a rule is compared, prompt by prompt, with the single draws that are best at the true text's entropy. What judges is
no ranker: n-grams of held-out books, and ROUGE-L against the true continuation.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hldm.config import GenerationConfig, changed
from hldm.evaluation.metrics import rouge_scores
from hldm.evaluation.prompts import Prompt, choose_prompts, prompt_chunker
from hldm.evaluation.tables import Table
from hldm.evaluation.words import split_words
from hldm.generation.candidates import Search, write_best
from hldm.generation.footprint import require_room_to_write
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.generation.ranking import RULES
from hldm.runs.folder import corpora_of_run
from hldm.runs.identity import require_shared_text
from hldm.runs.location import pipeline_of
from hldm.studies.brier import GRAM, brier_lm, brier_terms, symbols
from hldm.studies.judge import NGram
from hldm.text.bytes import count_characters

ROWS = 1024  # written at once, candidates included
NEAR = 0.03  # of the true text's entropy: what varies as much as it
AGAIN = 2**24  # between seeds of independent texts: torch takes 32 bits of one, and each prompt adds one
TEMPERATURES = (0.7, 0.85, 1.0)  # of the decoder, for each rule
SINGLE = (0.35, 0.5, 0.7, 0.85, 1.0)  # for single draws, which are to have their best

# head of the table: key, format
COLUMNS: Mapping[str, tuple[str, str]] = {
    "": ("name", ""),
    "decoder at": ("decoder_temperature", ".2f"),
    "n-gram bits": ("ngram_bits", ".3f"),
    "±": ("ngram_error", ".3f"),
    "entropy": ("entropy", ".2f"),
    "ROUGE-L": ("rouge", ".4f"),
    "its ±": ("rouge_error", ".4f"),
    "BrierLM": ("brier", ".1f"),
    "of it ±": ("brier_error", ".1f"),
    "bits saved": ("best_bits", ""),
    "ROUGE-L more": ("best_rouge", ""),
    "saved as shipped": ("shipped_bits", ""),
    "more as shipped": ("shipped_rouge", ""),
    "chars/s": ("characters_per_second", ",.0f"),
}
LEGEND = f"""\
*                entropy within {NEAR:.0%} of the true text's
bits saved       of a character, by a judge of n-grams, against the single draws marked reference: those of the fewest
                 bits at the true text's entropy; ROUGE-L more: likewise
BrierLM          100 for a writer that knows the text; of the first four bytes of two texts a prompt (docs/scoring.md)
as shipped       against single draws at the decoder temperature that the run writes with"""


class Judge(NamedTuple):
    """n-grams of held-out books, and ROUGE-L against the true continuations."""

    ngram: NGram
    prompts: Sequence[Prompt]

    def __call__(self, texts: Sequence[bytes]) -> dict[str, Any]:
        """Figures of one text a prompt; those of each prompt under "each", for differences."""
        decoded = [text.decode("utf-8", "replace") for text in texts]
        bits = np.array(
            [
                self.ngram.bits(prompt.text + text, begin=len(prompt.text)) / max(count_characters(text), 1)
                for prompt, text in zip(self.prompts, texts, strict=True)
            ]
        )
        rouge = np.array(
            [
                rouge_scores([text], [prompt.continuation])["rougeL"] or 0.0
                for prompt, text in zip(self.prompts, decoded, strict=True)
            ]
        )
        return {
            "ngram_bits": bits.mean(),
            "ngram_error": _error(bits),
            "entropy": entropy(decoded, 1),
            "pair_entropy": entropy(decoded, 2),
            "rouge": rouge.mean(),
            "rouge_error": _error(rouge),
            "each": (bits, rouge),
        }


def entropy(texts: Sequence[str], n: int) -> float:
    """Of the frequencies of n words in a row, pooled over texts, in bits."""
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = split_words(text)
        grams.update(zip(*(words[i:] for i in range(n)), strict=False))
    total = max(grams.total(), 1)
    return sum(count / total * math.log2(total / count) for count in grams.values())


def _error(values: np.ndarray) -> float | None:
    """Standard error of a mean over prompts; None for one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def study_candidates(
    folder: Path,
    *,
    twin: Path | None = None,
    rules: Sequence[str] = (),
    candidates: int = 8,
    depth: int = 16,
    temperatures: Sequence[float] = TEMPERATURES,
    prompts: int = 128,
    max_characters: int = 200,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """What a run writes by single draws and by each rule, at each decoder temperature; its twin likewise.

    rules: names of RULES; () for all that the model has something for
    depth: chunks of a stub; the twin's stubs have about as many bytes
    Raises ValueError or OSError.
    """
    if twin is not None:
        require_shared_text(folder, twin)
    pipeline = read_pipeline(pipeline_of(folder))
    chosen, judge = judge_of(folder, pipeline, prompts, max_characters)
    true = judge([prompt.continuation.encode() for prompt in chosen]) | {"name": "true text", "rouge": None}
    rows = [true | {"rouge_error": None}]
    models = {"": (pipeline, depth)}
    if twin is not None:
        other = read_pipeline(pipeline_of(twin))
        models["twin, "] = (other, _stretches(depth, pipeline, other))
    for prefix, (model, its_depth) in models.items():
        searches = _searches(model, rules, candidates, its_depth)
        written = []
        singles = sorted({*SINGLE, *temperatures, model.settings.decoder_temperature})
        for name, search in searches.items():
            for temperature in singles if name == "single" else temperatures:
                say(f"{prefix}{name}, decoder temperature {temperature:g}")
                settings = changed(model.settings, decoder_temperature=temperature)
                texts, seconds = _write(model, settings, search, chosen, max_characters, seed)
                # of single draws no more than BrierLM reads; what a rule chooses depends on whole stubs
                length = GRAM if search.candidates == 1 else max_characters
                again, _ = _write(model, settings, search, chosen, length, seed + AGAIN)
                speed = sum(map(count_characters, texts)) / seconds
                written.append({"name": prefix + name, "decoder_temperature": temperature} | judge(texts))
                written[-1] |= _brier(texts, again, chosen) | {"characters_per_second": speed}
        shipped = model.settings.decoder_temperature
        _compare(written, true["entropy"], f"{prefix}single", shipped)
        rows += written
    for row in rows:
        del row["each"]
    asked = {"candidates": candidates, "depth": depth, "max_characters": max_characters, "seed": seed}
    return {"run": folder.resolve().name, "prompts": len(chosen), **asked, "candidates_judged": rows}


def _brier(first: Sequence[bytes], second: Sequence[bytes], prompts: Sequence[Prompt]) -> dict[str, float]:
    """BrierLM of the first bytes of two texts a prompt (hldm.studies.brier)."""
    truth = symbols([prompt.continuation.encode() for prompt in prompts])
    found = brier_lm(brier_terms(symbols(first), symbols(second), truth))
    return {"brier": found.value, "brier_error": found.standard_error}


def judge_of(
    folder: Path, pipeline: HLDMPipeline, prompts: int, max_characters: int
) -> tuple[list[Prompt], Judge]:
    """Places of the test text, and what judges one text written at each. Raises ValueError where there is no room."""
    corpora = corpora_of_run(folder)
    chunker = prompt_chunker(pipeline.autoencoder)
    chosen = choose_prompts(corpora["test"], chunker, prompts, max_characters=max_characters)
    if not chosen:
        raise ValueError(f"{corpora['test'].name} has no room for a prompt and a continuation")
    return chosen, Judge(NGram(corpora["validation"].text.tobytes()), chosen)


def _stretches(depth: int, model: HLDMPipeline, twin: HLDMPipeline) -> int:
    """Stretches of the twin about as long as `depth` chunks of the model."""
    chunking = model.autoencoder.chunking
    size = (chunking.min_bytes + chunking.max_bytes) / 2
    return max(round(depth * size / twin.autoencoder.chunking.max_bytes), 1)


def _searches(model: HLDMPipeline, rules: Sequence[str], candidates: int, depth: int) -> dict[str, Search]:
    """Single draws, then each rule that this model has something for."""
    found = {"single": Search()}
    for name in rules or RULES:
        search = Search(candidates=candidates, rank=name, depth=depth)
        try:
            search.rule(model.prior)
        except ValueError:
            if rules and model.prior is not None:  # asked for; a twin may lack what its model has
                raise
            continue
        found[f"{name} of {candidates}"] = search
    return found


def _write(
    model: HLDMPipeline,
    settings: GenerationConfig,
    search: Search,
    prompts: Sequence[Prompt],
    max_characters: int,
    seed: int,
) -> tuple[list[bytes], float]:
    """A continuation of each prompt, on through the ends of documents, and the seconds it took."""
    texts: list[bytes] = []
    size = max(ROWS // search.stubs, 1)
    began = time.perf_counter()
    for start in range(0, len(prompts), size):
        part = [prompt.text for prompt in prompts[start : start + size]]
        require_room_to_write(model.autoencoder, model.prior, part, search.stubs, max_characters)
        writing = write_best(
            model.autoencoder,
            model.prior,
            part,
            settings,
            search,
            max_characters=max_characters,
            seed=seed + start,
            through_ends=True,
        )
        rows, _, _ = deque(writing, maxlen=1).pop()
        texts += [row.text for row in rows]
    return texts, time.perf_counter() - began


def _compare(rows: Sequence[dict[str, Any]], wanted: float, single: str, shipped: float) -> None:
    """Add to each row what it saves and gains against single draws, paired over prompts: (mean, standard error).

    best:    against those of the least n-gram bits within NEAR of the true text's entropy (or the nearest to it)
    shipped: against those at the decoder temperature that the run writes with
    """
    singles = [row for row in rows if row["name"] == single]
    singles.sort(key=lambda row: abs(row["entropy"] / wanted - 1))
    near = [row for row in singles if abs(row["entropy"] / wanted - 1) <= NEAR] or singles[:1]
    best = min(near, key=lambda row: row["ngram_bits"])
    best["is_reference"] = True
    references = {
        "best": best,
        "shipped": next(row for row in singles if row["decoder_temperature"] == shipped),
    }
    for row in rows:
        row["is_near"] = abs(row["entropy"] / wanted - 1) <= NEAR
        for kind, reference in references.items():
            if row is not reference:
                saved, gained = (a - b for a, b in zip(row["each"], reference["each"], strict=True))
                row[f"{kind}_bits"] = (-float(saved.mean()), _error(saved))
                row[f"{kind}_rouge"] = (float(gained.mean()), _error(gained))


def table(found: Mapping[str, Any]) -> Table:
    """A row for each way of writing; * marks an entropy near the true text's, and what others are compared with."""
    return Table.of_records(
        (
            row
            | {key: _signed(row[key], key) for key in row if key.startswith(("best_", "shipped_"))}
            | {
                "name": row["name"]
                + " *" * row.get("is_near", False)
                + " reference" * row.get("is_reference", False)
            }
            for row in found["candidates_judged"]
        ),
        COLUMNS,
    )


def _signed(found: tuple[float, float | None], key: str) -> str:
    """+0.0066 ± 0.0029"""
    digits = 3 if key.endswith("bits") else 4
    return f"{found[0]:+.{digits}f}" + ("" if found[1] is None else f" ± {found[1]:.{digits}f}")
