"""`hldm score`: what given texts cost under a model, in bits."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

from typer import Option

from hldm.commands.options import AllowCode, RunName, Seed
from hldm.evaluation.tables import Table, legend, short, show
from hldm.runs.doing import loading
from hldm.runs.progress import END_TERM
from hldm.sources.encodings import read_text
from hldm.text.bytes import MAX_PROMPT_BYTES

COLUMNS = {  # head of the table: key, format
    "text": ("text", ""),
    "characters": ("characters", ",d"),
    "bits": ("bits", ",.2f"),
    "±": ("standard_error", ".2f"),
    "bits/char": ("bits_per_character", ".4f"),
    "decoder": ("decoder", ",.2f"),
    "latent": ("latent", ",.2f"),
    "end": ("end", ".2f"),
}
TIGHTER = {"importance": ("importance", ",.2f"), "its ±": ("importance_error", ".2f")}
BOUND = "what the text costs: an upper bound on -log2 p, the sum of decoder, latent and end; lower is better"
OF_TWIN = {
    "bits": "what the text costs: its likelihood, -log2 p; lower is better",
    "bits/char": "bits by characters",
}
MEANINGS = {
    "±": "the standard error of bits, from the noise that was drawn",
    "bits/char": "bits by characters",
    "decoder": "of bits, those of the bytes, given the latents",
    "latent": "of bits, those of the latents, given the text before",
    "end": f"of bits, {END_TERM}",
    "importance": "a tighter bound than bits, by importance-weighted draws",
    "its ±": "its standard error",
}


def score(
    *,
    run: RunName = "small",
    text: Annotated[
        list[str] | None, Option(metavar="FILE", help="file to take; may repeat; - is standard input")
    ] = None,
    lines: Annotated[bool, Option("--lines", help="score each line of the files by itself")] = False,
    prompt: Annotated[list[str] | None, Option(metavar="TEXT", help="score this text; may repeat")] = None,
    prefix: Annotated[str, Option(help="text before every text, not scored itself")] = "",
    draws: Annotated[int, Option(help="noise levels a chunk; an even number")] = 8,
    samples: Annotated[int, Option(min=0, help="also the bound by this many importance-weighted draws")] = 0,
    seed: Seed = 0,
    allow_code: AllowCode = False,
    as_json: Annotated[bool, Option("--json", help="one JSON object a text")] = False,
) -> None:
    """What texts cost under a model, in bits.

    A bound on -log2 p, with its standard error; of a twin the likelihood itself. Texts share their noise, so
    that they can be compared.
    """
    texts: list[tuple[str, bytes]] = []  # what to call each, and what it is
    for name in text or []:
        given = read_text(name, MAX_PROMPT_BYTES)
        if lines:
            texts += [(line.decode(), line) for line in given.split(b"\n") if line.strip()]
        else:
            texts.append((name, given))
        if not given.strip():
            raise ValueError(f"{name} holds nothing but white space: there is nothing to score")
    texts += [(words, os.fsencode(words)) for words in prompt or []]
    if not texts:
        raise ValueError("no text given: pass --text FILE, --text - or --prompt TEXT")
    if lines and not text:
        raise ValueError("--lines is about --text: each --prompt is scored by itself anyway")
    with loading():
        from hldm.generation.pipeline import HLDMPipeline

    pipeline = HLDMPipeline.from_pretrained(run)
    scores = pipeline.score(
        [given for _, given in texts], os.fsencode(prefix), draws=draws, samples=samples, seed=seed
    )
    records = [{"text": name, **found.as_dict()} for (name, _), found in zip(texts, scores, strict=True)]
    if as_json:
        for record in records:
            print(json.dumps(record))
        return
    columns = {**COLUMNS, **(TIGHTER if samples else {})}
    rows: list[dict[str, Any]] = [{**record, "text": short(record["text"])} for record in records]
    if len(records) > 1:
        rows.append(_total(records))
    meanings = {**MEANINGS, "bits": BOUND} if pipeline.prior is not None else OF_TWIN
    show(Table.of_records(rows, columns), legend(meanings, columns))


def _total(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over texts. Their noise is shared, so the sum's standard error is not known from theirs."""
    keys = ("characters", "bits", "decoder", "latent", "end", "importance")
    found = {key: sum(record[key] for record in records) for key in keys if records[0][key] is not None}
    return {"text": "all", **found, "bits_per_character": found["bits"] / found["characters"]}
