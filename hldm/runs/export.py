"""A trained run as a folder to share: what loads, and nothing that says where or by which command it was made.

    README.md  data.json  evaluation.json  pipeline/  autoencoder/  prior/

A stage keeps config.yaml, environment.json and totals.json. Knows no model: hldm.evaluation.sharing writes the card.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hldm.config import DataConfig, config_of_run
from hldm.runs.folder import corpora_of_run, read_totals
from hldm.sources.notes import first_line, note
from hldm.text.bytes import count_characters
from hldm.text.corpus import SPLITS

STAGES = ("autoencoder", "prior")
DATA, EVALUATION = "data.json", "evaluation.json"
BUILT_IN = "the Bible in Basic English (public domain), built into hldm"


def stages_of(run: Path) -> list[Path]:
    """The folders of a run's finished stages."""
    return [run / stage for stage in STAGES if (run / stage / "totals.json").is_file()]


def export_run(run: Path, target: Path, files: Mapping[str, str] | None = None) -> None:
    """Copy a trained run without what only training needs, and without paths and commands of this machine.

    files: more to write into it, by name
    Raises FileNotFoundError for a run that is not finished, ValueError when the target is there already.
    """
    check_export(run, target)
    fresh = target.with_name(f".{target.name}.new-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run / "pipeline", fresh / "pipeline")
        for path in fresh.rglob("*.json"):
            _rewrite(path, lambda found: {k: v for k, v in found.items() if k != "_name_or_path"})
        for stage in stages_of(run):
            read_totals(stage)  # refuses one without a step of training
            (fresh / stage.name).mkdir()
            shutil.copyfile(stage / "totals.json", fresh / stage.name / "totals.json")
            if (stage / "environment.json").is_file():
                shutil.copyfile(stage / "environment.json", fresh / stage.name / "environment.json")
                _rewrite(
                    fresh / stage.name / "environment.json",
                    lambda starts: [{k: v for k, v in start.items() if k != "argv"} for start in starts],
                )
            text = (stage / "config.yaml").read_text(encoding="utf-8")
            (fresh / stage.name / "config.yaml").write_text(without_places(text), encoding="utf-8")
        for name, text in (files or {}).items():
            (fresh / name).write_text(text, encoding="utf-8")
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_export(run: Path, target: Path) -> None:
    """Raise FileNotFoundError or ValueError, one line, unless this run can be exported to that folder."""
    if not (run / "pipeline" / "model_index.json").is_file():
        raise FileNotFoundError(f"{run} holds no finished run: train its last stage first")
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already: delete it or choose another name")
    above = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"{target}: {above} is no folder that can be written to")


def _rewrite(path: Path, change: Any) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(found), indent=2) + "\n", encoding="utf-8")


def public_name(path: str) -> str:
    """A path that says nothing of this machine: as it is where it lies below the current folder, else its last part."""
    is_below = not (os.path.isabs(path) or path.startswith("~") or ".." in Path(path).parts)
    return path if is_below else Path(path).name


def without_places(text: str) -> str:
    """A config.yaml with the `public_name` of its text; as it is where that changes nothing."""
    settings = yaml.safe_load(text)
    data = settings.get("data", {})
    places = {key: public_name(str(data[key])) for key in ("path", "dataset") if data.get(key)}
    if "dataset" in places and not Path(data["dataset"]).exists():
        places["dataset"] = data["dataset"]  # of a hub
    if all(data[key] == place for key, place in places.items()):
        return text
    settings["data"] = {**data, **places}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def source_of(data: DataConfig) -> str:
    """Where a run's text came from, in words."""
    if data.path:
        return public_name(data.path)
    if not data.dataset:
        return BUILT_IN
    name = public_name(data.dataset) if Path(data.dataset).exists() else data.dataset
    return f"dataset {name}{f' ({data.subset})' if data.subset else ''}, split {data.split}"


def summarise_data(run: Path) -> dict[str, Any]:
    """What a run was trained on: source, and of each split bytes, characters, documents and fingerprint.

    Read from the text where it is here, else from what an export of it says; of a text that is nowhere, the source
    and the fingerprint of its training split, as far as the run kept it. `missing` says why then.
    """
    if (run / DATA).is_file():
        return dict(json.loads((run / DATA).read_text(encoding="utf-8")))
    data = config_of_run(run).data
    found: dict[str, Any] = {"source": source_of(data), "held_out": data.held_out, "splits": {}}
    if source_of(data) == BUILT_IN:
        found["held_out"] = "whole books"
    try:
        corpora = corpora_of_run(run)
    except (OSError, ValueError) as error:
        note(f"its text is not counted in {DATA}: {first_line(error).partition('; or pass --text')[0]}")
        trained_on = read_totals(run / "autoencoder").corpus
        if trained_on:
            found["splits"]["train"] = {"fingerprint": trained_on}
        return {**found, "missing": "the text was not at hand when this was exported: it is not counted"}
    for split in SPLITS:
        corpus = corpora[split]
        found["splits"][split] = {
            "bytes": len(corpus.text),
            "characters": count_characters(corpus.text.tobytes()),
            "documents": len(corpus),
            "fingerprint": corpus.fingerprint,
        }
    return found
