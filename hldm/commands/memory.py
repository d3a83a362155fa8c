"""`hldm memory`: store what followed which context, and measure what remembering it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from hldm.commands.options import AllowCode, MaxCharacters, Report, RunName, Seed, Text
from hldm.evaluation.tables import show
from hldm.runs.doing import doing
from hldm.runs.location import find_model
from hldm.runs.reports import check_report_path, save_report

app = typer.Typer(help="Remember what followed contexts like this one.", rich_markup_mode=None)


@app.callback()
def _memory() -> None:
    """Remember what followed contexts like this one (docs/steering.md)."""


@app.command()
def build(
    *,
    run: RunName = "small",
    out: Annotated[Path, Option(metavar="DIR", help="folder to make; it must not be there yet")],
    text: Annotated[
        Path | None, Option(metavar="FILE", help="store this file instead of the training text")
    ] = None,
    seed: Seed = 0,
    allow_code: AllowCode = False,
) -> None:
    """Store a run's training text, and fit on its validation text how far to trust it."""
    from hldm.studies.memory import build_memory

    with doing(f"reading text into {out}"):
        found = build_memory(find_model(run), out, text=text, seed=seed)
    print(f"fitted on the validation text, how far to trust each memory: {', '.join(found['gates'])}")
    print(f'wrote {out}\n\nNext:\n  hldm generate --run {run} --memory {out} --prompt "..."')
    print(f"  hldm memory measure --run {run} --memory {out}")


@app.command()
def measure(
    *,
    run: RunName = "small",
    memory: Annotated[
        str,
        Option(
            metavar="DIR", help="of hldm memory build; document: its own text; pyramid: that through an index"
        ),
    ] = "document",
    twin: Annotated[
        Path | None, Option(metavar="RUN", help="twin to measure beside it, with a cache of the document")
    ] = None,
    text: Text = None,
    rare: Annotated[
        int, Option(min=0, help="a word is rare if the training text has it at most this often")
    ] = 5,
    draws: Annotated[int, Option(min=1, help="draws of each chunk's latent")] = 4,
    prompts: Annotated[int, Option(min=0, help="prompts to continue, with and without; 0: none")] = 0,
    max_characters: MaxCharacters = 400,
    seed: Seed = 0,
    json: Report = None,
    allow_code: AllowCode = False,
) -> None:
    """Bits with and without a memory; with --prompts what it writes, copies and takes."""
    if json is not None:
        check_report_path(json, "rows")
    from hldm.studies import memory as bits

    folder = find_model(run)
    with doing(f"measuring bits with and without {memory}"):
        found = bits.measure_memory(
            folder,
            memory,
            twin=None if twin is None else find_model(twin),
            text=text,
            rare=rare,
            draws=draws,
            seed=seed,
        )
    show(*bits.tables(found))
    if prompts:
        from hldm.studies import memory_samples as samples

        with doing("writing with and without it"):
            written = samples.measure_samples(
                folder, memory, text=text, prompts=prompts, max_characters=max_characters, seed=seed
            )
        show("", *samples.tables(written))
        found["samples"] = written
    if json is not None:
        save_report(json, found)
        print(f"wrote {json}")


def codebook(
    *,
    run: RunName = "small",
    memory: Annotated[
        Path | None,
        Option(metavar="DIR", help="memory for which k-means centres and hashing are measured, too"),
    ] = None,
    prompts: Annotated[int, Option(min=0, help="prompts to continue with rounded latents; 0: none")] = 24,
    max_characters: MaxCharacters = 400,
    seed: Seed = 0,
    json: Report = None,
    allow_code: AllowCode = False,
) -> None:
    """What rounding latents to a codebook does to bits and to written text."""
    if json is not None:
        check_report_path(json, "codebooks")
    from hldm.studies import codebook as study

    with doing("rounding latents, and writing with them"):
        found = study.measure_codebooks(
            find_model(run), memory=memory, prompts=prompts, max_characters=max_characters, seed=seed
        )
    show(*study.tables(found))
    if json is not None:
        save_report(json, found)
        print(f"wrote {json}")
