"""What `hldm export` writes: a folder to share, and the card that says what is in it.

Scores are those of the run's evaluation.json, measured now, or said to be missing; a sample is written now.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hldm.config import to_dict
from hldm.evaluation.evaluate import evaluate_run, weights_of
from hldm.evaluation.parts_table import short_tables
from hldm.evaluation.tables import Table, compare
from hldm.generation.pipeline import HLDMPipeline, HLDMPipelineOutput, read_pipeline
from hldm.runs.card import CARD, model_card
from hldm.runs.export import (
    BUILT_IN,
    DATA,
    EVALUATION,
    check_export,
    export_run,
    public_name,
    stages_of,
    summarise_data,
)
from hldm.runs.folder import read_totals
from hldm.runs.machine import human
from hldm.text.bytes import printable

SAMPLE_CHARACTERS = 400


def share_run(
    run: Path,
    target: Path,
    *,
    licence: str = "",
    prompt: str = "",
    measure: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Export a run to a folder of its own, and say what is in it and what is missing.

    licence: of the weights, as SPDX names it; "": mit for what the built-in text trained, else said to be unknown
    prompt: what the card's sample goes on from;  measure: evaluate a run that has no scores yet
    Raises FileNotFoundError, ValueError, one line; then nothing is written.
    """
    check_export(run, target)
    pipeline = read_pipeline(run / "pipeline")
    scores = _scores(run, pipeline, measure, say)
    data = summarise_data(run)
    licence = licence or ("mit" if data["source"] == BUILT_IN else "")
    sections = {"Scores": _scores_section(scores, target.name)}
    if parts := short_tables((scores or {}).get("parts")):
        sections["What each part is worth"] = "\n\n".join(map(str, parts))
    sections["A sample"] = _sample(pipeline, prompt)
    sections["Data"] = _data_section(data)
    sections["How it was made"] = _making_section(run)
    card = model_card(
        target.name,
        pipeline.parameter_count,
        is_twin=pipeline.prior is None,
        licence=licence,
        sections=sections,
        is_run=True,
    )
    files = {CARD: card, DATA: _as_json(data)}
    if scores is not None:
        files[EVALUATION] = _as_json(scores)
    export_run(run, target, files)
    for line in _contents(target):
        say(line)
    if scores is None:
        say(f"no scores: {run}/{EVALUATION} is not there; --measure measures it now")
    if not licence:
        say("no licence: --licence says under which one the weights may be used, e.g. --licence cc-by-4.0")


def _as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _contents(folder: Path) -> list[str]:
    """A line for each thing in an exported folder, with its size."""

    def size(place: Path) -> int:
        return sum(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())

    kinds = {
        CARD: "what it is: scores, sample, data, how it was made",
        "pipeline": "the model",
        "autoencoder": "settings, cost and environment of stage one",
        "prior": "of stage two",
        DATA: "the text it was trained on, in figures",
        EVALUATION: "all scores",
    }
    found = [(name, what) for name, what in kinds.items() if (folder / name).exists()]
    lines = [f"  {name:16}{human(size(folder / name)):>10}  {what}" for name, what in found]
    return [f"wrote {folder}, {human(size(folder))}:", *lines]


# ---- sections of the card


def _scores(
    run: Path, pipeline: HLDMPipeline, measure: bool, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """What a run's evaluation.json says, or a measurement; else None. Raises ValueError for one of another model."""
    path = run / EVALUATION
    if not path.is_file():
        if not measure:
            return None
        say(f"measuring {run} on its test text")
        return evaluate_run(run)
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        found["bits_per_character"]["bound"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"{path} is no evaluation: remove it, and measure again with --measure") from None
    if found.get("model") not in (None, weights_of(pipeline)):
        raise ValueError(f"{path} is of other weights: remove it, and measure again with --measure")
    return found | {"split": public_name(str(found.get("split", "test")))}


def _scores_section(scores: Mapping[str, Any] | None, name: str) -> str:
    if scores is None:
        return f"Not measured when this was shared: `hldm evaluate --run {name} --text FILE` measures."
    bits = scores["bits_per_character"]
    kind = "their likelihood" if scores.get("characters_per_chunk") is None else "an upper bound"
    return (
        f"{bits['bound']:.3f} ± {bits['standard_error']:.3f} bits a character ({kind}; the error is that of the noise "
        f"drawn) on {_split(scores)}, by `hldm evaluate`.\n\n{compare({name: scores})}"
    )


def _split(scores: Mapping[str, Any]) -> str:
    """What was measured on, in words."""
    if scores.get("measured_on"):
        return str(scores["measured_on"])
    split = scores["split"]
    named = f"the {split} text that was held out" if split in ("test", "validation") else f"the file {split}"
    return f"{named} ({scores['characters']:,} characters)" if "characters" in scores else named


def _sample(pipeline: HLDMPipeline, prompt: str) -> str:
    """A text written now, in a fence that nothing in it closes."""
    found = pipeline(prompt, max_characters=SAMPLE_CHARACTERS, seed=0)
    assert isinstance(found, HLDMPipelineOutput)
    used = to_dict(pipeline.settings)
    if pipeline.prior is None:
        used = {key: used[key] for key in ("decoder_temperature", "top_p")}
    settings = ", ".join(f"{key} {value}" for key, value in used.items())
    start = "After the prompt, which ends at >>>" if prompt else "Without a prompt"
    given = f"{prompt} >>>" if prompt else ""
    text = "\n".join(f"    {line}" for line in printable(given + found.texts[0]).splitlines())
    return f"{start}: seed 0, the first and only try, with the settings {settings}.\n\n{text}"


def _data_section(data: Mapping[str, Any]) -> str:
    """Source and size of the text, by split."""
    columns = {
        "": ("name", ""),
        "bytes": ("bytes", ",.0f"),
        "characters": ("characters", ",.0f"),
        "documents": ("documents", ",.0f"),
        "fingerprint": ("short", ""),
    }
    rows = [
        {"name": name, **found, "short": found["fingerprint"][:12]} for name, found in data["splits"].items()
    ]
    share = data["held_out"]
    of_it = f"{100 * share:.3g} % for validation, as much for the test" if isinstance(share, float) else share
    told = f"Source: {printable(data['source'])}. Kept from training: {of_it}."
    if missing := data.get("missing"):
        told += f" {missing[0].upper()}{missing[1:]}."
    return f"{told}\n\n{Table.of_records(rows, columns)}" if rows else told


def _making_section(run: Path) -> str:
    """What training took, stage by stage, on which machine and by which code."""
    columns = {
        "stage": ("stage", ""),
        "steps": ("steps", ",.0f"),
        "minutes": ("minutes", ",.1f"),
        "characters": ("characters", ",.0f"),
        "commit": ("commit", ""),
        "code": ("code", ""),
        "Python, torch": ("versions", ""),
    }
    rows, machines = [], []
    for stage in stages_of(run):
        totals, last = read_totals(stage), _last_start(stage)
        machine = f"{last.get('cores')} cores of {last.get('cpu')}, torch on {last.get('threads')} of them"
        machines.append(", ".join([machine, *last.get("accelerators", [])]) if last else "not kept")
        edited = ", edited" if last.get("dirty") else ""
        commit = f"{(last.get('commit') or 'not a clone')[:12]}{edited}"
        versions = f"{last.get('python')}, {last.get('torch')}" if last else None
        rows.append(
            {
                "stage": stage.name,
                "steps": totals.steps,
                "minutes": totals.seconds / 60,
                "characters": totals.characters,
                "commit": commit,
                "code": last.get("code", "")[:12] or None,
                "versions": versions,
            }
        )
    where = "; ".join(dict.fromkeys(machines))
    return (
        f"Settings: `{rows[0]['stage']}/config.yaml`, one file for all stages. Machine: {where}. The commit is that of "
        "hldm's repository, marked `edited` where files differed from it; code is a fingerprint of hldm's own files."
        f"\n\n{Table.of_records(rows, columns)}"
        if rows
        else "Not kept."
    )


def _last_start(stage: Path) -> dict[str, Any]:
    """The environment that a stage was last started in; {} where that was not kept."""
    path = stage / "environment.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))[-1]) if path.is_file() else {}
