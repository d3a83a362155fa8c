"""What rules of decoding do to what is written: judged bits against entropy, at several temperatures: `hldm decoding`.

    hldm decoding --run small --twin small-twin --json decoding.json

Plain decoding at a lower temperature saves bits of any judge and varies less. A rule is worth something where it saves
more than plain decoding saves at the same entropy: `saved` is the distance to a parabola through plain decoding's
(entropy, bits). The judge is that of `hldm.studies.best_of`. All write in plain torch, so that speeds compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hldm.config import GenerationConfig, changed
from hldm.evaluation.prompts import Prompt
from hldm.evaluation.tables import Table
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.generation.writer import LatentWriter, nothing_written, row_generators
from hldm.runs.clock import clock_named
from hldm.runs.identity import require_shared_text
from hldm.runs.location import pipeline_of
from hldm.studies.best_of import AGAIN, NEAR, Judge, judge_of
from hldm.studies.decoding_rules import ContrastingWriter, EarlyWriter
from hldm.text.bytes import count_characters

PLAIN = (0.4, 0.55, 0.7, 0.85, 1.0)  # of the decoder: a parabola through fewer says little of its error
TEMPERATURES = (0.7, 1.0)  # of every rule
WEIGHTS = (0.25, 0.5, 1.0)  # of a contrast; Li et al. take 1, without a decoder that has a latent
STEPS = 16  # that early exit may take
THRESHOLDS = (0.1, 0.3)  # of how far the estimate of a latent moves in a step; latents have deviation 1
GUIDANCE = (1.5, 2.0)
ROWS = 384  # written at once

COLUMNS: Mapping[str, tuple[str, str]] = {
    "": ("name", ""),
    "decoder at": ("decoder_temperature", ".2f"),
    "n-gram bits": ("ngram_bits", ".3f"),
    "±": ("ngram_error", ".3f"),
    "entropy": ("entropy", ".3f"),
    "its ±": ("entropy_error", ".3f"),
    "ROUGE-L": ("rouge", ".4f"),
    "of it ±": ("rouge_error", ".4f"),
    "saved": ("saved", "+.3f"),
    "± of it": ("saved_error", ".3f"),
    "steps": ("steps", ".1f"),
    "chars/s": ("characters_per_second", ",.0f"),
}
LEGEND = f"""\
*      entropy within {NEAR:.0%} of the true text's
saved  bits a character, by a judge of n-grams, against plain decoding at that entropy
steps  of denoising, a chunk;  chars/s: a second of a CPU core's time, all rows together"""


class Rule(NamedTuple):
    """A way of decoding: the settings that it needs, and what makes its writer."""

    name: str
    make: Callable[..., LatentWriter] = LatentWriter
    changes: Mapping[str, Any] = {}
    temperatures: Sequence[float] = TEMPERATURES


def rules_of(pipeline: HLDMPipeline, twin: tuple[str, HLDMPipeline] | None) -> list[Rule]:
    """All that are measured, plain decoding first."""
    early = {"steps": STEPS, "scheduler": "ancestral", "guidance": 1.0}
    guided = {"steps": max(pipeline.settings.steps, 1)}
    rules = [Rule("plain", temperatures=sorted({*PLAIN, *TEMPERATURES}))]
    rules += [
        Rule(f"against zeros, {weight:g}", partial(ContrastingWriter, weight=weight)) for weight in WEIGHTS
    ]
    if twin is not None:
        name, other = twin
        rules += [
            Rule(
                f"against {name}, {weight:g}",
                partial(ContrastingWriter, weight=weight, twin=other.autoencoder),
            )
            for weight in WEIGHTS
        ]
    rules.append(Rule(f"{STEPS} steps", changes=early))
    rules += [
        Rule(f"early exit below {threshold:g}", partial(EarlyWriter, threshold=threshold), early)
        for threshold in THRESHOLDS
    ]
    rules += [Rule(f"guidance {g:g}", changes=guided | {"guidance": g}) for g in GUIDANCE]
    return rules


@torch.no_grad()
def measure_decoding(
    folder: Path,
    *,
    twin: Path | None = None,
    prompts: int = 128,
    max_characters: int = 100,
    seeds: int = 3,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """What every rule writes at every temperature, on the test text; errors are over seeds.

    Raises ValueError or OSError, one line.
    """
    if seeds < 2:
        raise ValueError(f"errors are over seeds: take 2 or more, got {seeds}")
    if twin is not None:
        require_shared_text(folder, twin)
    pipeline = read_pipeline(pipeline_of(folder))
    if pipeline.prior is None or pipeline.prior.mixture is None:
        raise ValueError(
            f"{folder} has no mixture over latents: pass a latent model with autoencoder.components"
        )
    other = None if twin is None else (twin.resolve().name, read_pipeline(pipeline_of(twin)))
    if other is not None and other[1].autoencoder.latent_dim:
        raise ValueError(f"{twin} is no twin: pass a run without latents, which writes byte by byte")
    chosen, judge = judge_of(folder, pipeline, prompts, max_characters)
    true = judge([prompt.continuation.encode() for prompt in chosen])
    rows: list[dict[str, Any]] = []
    for rule in rules_of(pipeline, other):
        for temperature in rule.temperatures:
            say(f"{rule.name}, decoder temperature {temperature:g}")
            settings = changed(pipeline.settings, **rule.changes, decoder_temperature=temperature)
            row = _written(
                pipeline,
                rule,
                settings,
                chosen,
                judge,
                max_characters,
                [seed + k * AGAIN for k in range(seeds)],
            )
            rows.append({"name": rule.name, "decoder_temperature": temperature, **row})
    compare(rows, true["entropy"])
    first = {"name": "true text", "ngram_bits": true["ngram_bits"], "entropy": true["entropy"]}
    asked = {"prompts": len(chosen), "max_characters": max_characters, "seeds": seeds, "seed": seed}
    return {"run": folder.resolve().name, **asked, "decoded": [first, *rows]}


def _written(
    pipeline: HLDMPipeline,
    rule: Rule,
    settings: GenerationConfig,
    chosen: Sequence[Prompt],
    judge: Judge,
    max_characters: int,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Figures of one continuation a prompt and seed; those of each seed under "each" (seeds 2): bits, entropy."""
    rows = [(prompt.text, first + place) for first in seeds for place, prompt in enumerate(chosen)]
    clock = clock_named("cpu")
    began, texts, steps, chunks = clock(), [], 0, 0
    for first in range(0, len(rows), ROWS):
        starts, own = zip(*rows[first : first + ROWS], strict=True)
        writer = rule.make(
            pipeline.autoencoder, pipeline.prior, starts, settings, row_generators(own, len(own))
        )
        continuations = nothing_written(starts, max_characters)
        while any(row.left for row in continuations):  # through the ends of documents
            for row, piece in zip(continuations, writer.write(), strict=True):
                row.add(piece.text)
            chunks += len(continuations)
        steps += writer.calls * (1 if isinstance(writer, EarlyWriter) else len(continuations))
        texts += [row.text for row in continuations]
    seconds = clock() - began
    found = [judge(texts[at : at + len(chosen)]) for at in range(0, len(texts), len(chosen))]
    record: dict[str, Any] = {
        "steps": steps / chunks,
        "characters_per_second": sum(map(count_characters, texts)) / seconds,
        "each": np.array([(one["ngram_bits"], one["entropy"]) for one in found]),
    }
    for key, error in (("ngram_bits", "ngram_error"), ("entropy", "entropy_error"), ("rouge", "rouge_error")):
        record[key], record[error] = _mean([one[key] for one in found])
    return record


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """With its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def compare(rows: Sequence[dict[str, Any]], wanted: float) -> None:
    """Add to each row the bits that it saves against plain decoding at its entropy, and whether that is near `wanted`.

    Plain decoding's bits are a parabola in its entropy, by least squares over seeds and temperatures.
    """
    plain = np.concatenate([row["each"] for row in rows if row["name"] == "plain"])
    curve = np.polynomial.Polynomial.fit(plain[:, 1], plain[:, 0], 2)
    for row in rows:
        bits, entropies = row.pop("each").T
        row["is_near"] = abs(row["entropy"] / wanted - 1) <= NEAR
        row["saved"], row["saved_error"] = _mean(curve(entropies) - bits)


def table(found: Mapping[str, Any]) -> Table:
    """A row for each rule and temperature; * marks an entropy near the true text's."""
    rows: Iterator[dict[str, Any]] = (
        row | {"name": row["name"] + " *" * row.get("is_near", False)} for row in found["decoded"]
    )
    return Table.of_records(rows, COLUMNS)
