"""Commands for text that is there: fill in between, write chunks anew, go from one text to another."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from hldm.commands import options
from hldm.config import GenerationConfig, changed
from hldm.evaluation.tables import Table, legend, short, show
from hldm.runs.doing import doing
from hldm.runs.folder import shipped_run
from hldm.runs.location import find_model, pipeline_of
from hldm.runs.reports import check_report_path, save_report
from hldm.text.bytes import printable

if TYPE_CHECKING:
    from hldm.generation.fill import Candidate
    from hldm.generation.pipeline import HLDMPipeline

Candidates = Annotated[
    int, Option(help="candidates to draw; they are ranked by the cost of the text after them")
]
ShowCandidates = Annotated[bool, Option("--show-candidates", help="print all candidates, the best first")]
PathName = Literal["linear", "spherical"]
CHUNKS = 3  # to fill in where no length is given: some 18 characters

CANDIDATE_COLUMNS = {
    "candidate": ("text", ""),
    "bits of the right": ("right_bits", ".2f"),
    "±": ("right_error", ".2f"),
    "its own bits": ("middle_bits", ".2f"),
}


def load(run: Path | None, **given: Any) -> tuple[HLDMPipeline, GenerationConfig]:
    """A run's pipeline, and its settings with those that are given."""
    asked = {name: value for name, value in given.items() if value is not None}
    changed(GenerationConfig(), **asked)  # refuses what is out of range before anything is loaded
    folder = pipeline_of(shipped_run() if run is None else find_model(run))
    from hldm.generation.pipeline import read_pipeline

    pipeline = read_pipeline(folder)
    return pipeline, changed(pipeline.settings, **asked)


def fill(
    *,
    run: options.RunOrShipped = None,
    left: Annotated[str, Option(help="text before; '': the document starts")] = "",
    right: Annotated[str, Option(help="text after")] = "",
    characters: Annotated[int | None, Option(help="characters to fill in")] = None,
    chunks: Annotated[int | None, Option(help=f"chunks to fill in, instead (default: {CHUNKS})")] = None,
    candidates: Candidates = 16,
    temperature: options.Temperature = None,
    decoder_temperature: options.DecoderTemperature = None,
    seed: options.Seed = 0,
    show_candidates: ShowCandidates = False,
    as_json: options.AsJson = False,
    measure: Annotated[
        int | None,
        Option(metavar="PLACES", help="measure instead: bits to find the true text at held-out places"),
    ] = None,
    measured: options.Measured = None,
    allow_code: options.AllowCode = False,
) -> None:
    """Write text between two texts.

    Candidates are drawn after the left one and ranked by how well the right one follows (docs/steering.md).
    """
    if measure is not None:
        _measure_filling(run, measure, CHUNKS if chunks is None else chunks, seed, measured)
        return
    if not right:
        raise ValueError(
            "give --right, the text after the gap (and --left); hldm generate writes on from one side"
        )
    pipeline, settings = load(run, temperature=temperature, decoder_temperature=decoder_temperature)
    found = pipeline.fill(
        os.fsencode(left),
        os.fsencode(right),
        characters=characters,
        chunks=CHUNKS if characters is None and chunks is None else chunks,
        candidates=candidates,
        seed=seed,
        settings=settings,
    )
    if as_json:
        record = {"left": left, "right": right, "text": _text(found[0].text), "seed": seed}
        print(json.dumps({**record, "candidates": [each.as_dict() for each in found]}))
        return
    best = printable(f"{left}|{_text(found[0].text)}|{right}")
    show(best, *([_candidates(found)] if show_candidates else []))


def _measure_filling(run: Path | None, places: int, chunks: int, seed: int, measured: Path | None) -> None:
    if measured is not None:
        check_report_path(measured, "filling")
    from hldm.studies.filling import MEANINGS, measure_filling, table

    folder = shipped_run() if run is None else find_model(run)
    with doing(f"drawing and weighing candidates at {places} places"):
        found = measure_filling(folder, places=places, chunks=chunks, seed=seed)
    head = f"{found['places']} places of the test text, {chunks} chunks, {found['choices']:.1f} choices"
    head += f", {found['seconds_a_place']:.1f} seconds of a CPU core a place"
    shown = table(found)
    show(head, shown, legend(MEANINGS, shown.head))
    if measured is not None:
        save_report(measured, found)


def edit(
    *,
    run: options.RunOrShipped = None,
    text: Annotated[str, Option(help="text to edit")],
    redraw: Annotated[
        str | None,
        Option(metavar="FIRST-LAST", help="chunks to write anew (default: none, show their numbers)"),
    ] = None,
    hold_latents: Annotated[
        bool, Option("--hold-latents", help="keep the latents of these chunks, write their bytes anew")
    ] = False,
    candidates: Candidates = 16,
    temperature: options.Temperature = None,
    decoder_temperature: options.DecoderTemperature = None,
    seed: options.Seed = 0,
    show_candidates: ShowCandidates = False,
    as_json: options.AsJson = False,
    allow_code: options.AllowCode = False,
) -> None:
    """Write some chunks of a text anew, and keep the others.

    Without --redraw: the chunks and their numbers.
    """
    wanted = None if redraw is None else _chunk_range(redraw)
    pipeline, settings = load(run, temperature=temperature, decoder_temperature=decoder_temperature)
    if wanted is None:
        from hldm.generation.fill import split_text

        parts = split_text(pipeline.autoencoder, os.fsencode(text))
        print(json.dumps({"chunks": list(map(_text, parts))}) if as_json else _numbered(parts))
        return
    found = pipeline.edit(
        os.fsencode(text),
        wanted,
        hold_latents=hold_latents,
        candidates=candidates,
        seed=seed,
        settings=settings,
    )
    if as_json:
        record = {"text": _text(found.text), "chunks": list(map(_text, found.chunks)), "seed": seed}
        record |= {"before": list(map(_text, found.before)), "redrawn": list(wanted)}
        print(json.dumps({**record, "candidates": [each.as_dict() for each in found.candidates]}))
        return
    lines = [_numbered(found.before), _numbered(found.chunks), printable(_text(found.text))]
    show("\n".join(lines), *([_candidates(found.candidates)] if show_candidates else []))


def interpolate(
    *,
    run: options.RunOrShipped = None,
    first: Annotated[str, Option("--from", help="the text at weight 0")] = "",
    second: Annotated[str, Option("--to", help="the text at weight 1")] = "",
    steps: Annotated[int, Option(help="weights from 0 to 1, both included")] = 7,
    path: Annotated[PathName, Option(help="between two latents: the line, or the arc")] = "linear",
    as_json: options.AsJson = False,
    measure: Annotated[
        int | None,
        Option(metavar="PAIRS", help="measure instead: how near held-out sentences' paths are to either end"),
    ] = None,
    measured: options.Measured = None,
    allow_code: options.AllowCode = False,
) -> None:
    """Go from one text to another through their latents."""
    if measure is not None:
        if measured is not None:
            check_report_path(measured, "interpolation")
        from hldm.studies.interpolation import MEANINGS, measure_interpolation, table

        with doing(f"going {steps} steps between the texts of {measure} pairs"):
            found = measure_interpolation(
                shipped_run() if run is None else find_model(run), pairs=measure, steps=steps
            )
        known = f"{found['known_words_of_the_ends']:.1%} of the words of the ends are known"
        known += f"; {found['characters_per_second']:,.0f} characters a second of a CPU core"
        shown = table(found)
        show(f"{measure} pairs of sentences of the test text; {known}", shown, legend(MEANINGS, shown.head))
        if measured is not None:
            save_report(measured, found)
        return
    if not first or not second:
        raise ValueError("give both --from TEXT and --to TEXT")
    pipeline, _ = load(run)
    written = pipeline.interpolate(os.fsencode(first), os.fsencode(second), steps=steps, path=path)
    if as_json:
        found_steps = [{"weight": step.weight, "text": _text(step.text)} for step in written]
        print(json.dumps({"from": first, "to": second, "path": path, "steps": found_steps}))
        return
    print("\n".join(f"{step.weight:.2f} {printable(_text(step.text))}" for step in written))


# ---- what is shown


def _chunk_range(text: str) -> tuple[int, int]:
    """3-5 or 3 as (first, last). Raises ValueError for anything else."""
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    if found is None:
        raise ValueError(f"--redraw takes FIRST-LAST, the numbers of chunks such as 3-5, got {text!r:.40}")
    return int(found[1]), int(found[2] or found[1])


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _numbered(chunks: list[bytes]) -> str:
    """Chunks and their numbers, in one line."""
    return " ".join(f"{number}[{printable(_text(chunk))}]" for number, chunk in enumerate(chunks, 1))


def _candidates(found: list[Candidate]) -> Table:
    return Table.of_records(
        ({**each.as_dict(), "text": short(_text(each.text))} for each in found), CANDIDATE_COLUMNS
    )
