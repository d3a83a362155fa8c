"""What results were made of, by fingerprint: code, text, model. Results of different origin share no table.

Knows no model: weights are files here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hldm import plugins
from hldm.config import Config, ConfigError, config_of_run, load_config, to_dict
from hldm.runs.files import sha256_of
from hldm.runs.folder import check_settings, read_totals
from hldm.runs.provenance import code_fingerprint
from hldm.runs.reports import save_report
from hldm.settings import dotted, is_own

if TYPE_CHECKING:
    from hldm.text.corpus import Corpus

# Of the data section, what says which text is read and how it is split; the others lay it out.
TEXT_SETTINGS = tuple(
    f"data.{key}"
    for key in (
        *("path", "dataset", "subset", "split", "field", "question", "separator"),
        *("stream", "max_bytes", "held_out"),
    )
)
# Settings that may differ between a trained run and the config that asks for it.
MAY_CHANGE_ONCE_TRAINED = ("name", "checkpoint.", "logging.", "generation.")
STAGES = ("autoencoder", "prior")
SHOWN = 12  # hex digits of a fingerprint in a message


def text_fingerprint(corpora: Mapping[Any, Corpus]) -> str:
    """One fingerprint of all splits of a text."""
    return _digest(corpora[split].fingerprint for split in sorted(corpora))


def origin_of(
    run: Path, text: str, models: str = "pipeline/**/*", stages: Sequence[str] = STAGES
) -> dict[str, str]:
    """Fingerprints of what a measurement of a run is made of: code, text (`text_fingerprint`) and model.

    models: pattern of the files that are the model;  stages: those that trained it
    trained: the code that the model was trained by; "": a run of before that was kept
    """
    files = sorted(path for path in run.glob(models) if path.is_file())
    first = run / models.partition("/")[0]
    parts = (f"{path.relative_to(first)} {sha256_of(path)}" for path in files)
    return {
        "code": code_fingerprint(),
        "text": text,
        "model": _digest(parts),
        "trained": trained_by(run, stages),
    }


def trained_by(run: Path, stages: Sequence[str] = STAGES) -> str:
    """The code (`code_fingerprint`) that the stages of a run were last started with; "" where that was not kept."""
    found = [
        json.loads(path.read_bytes())[-1].get("code", "")
        for stage in stages
        if (path := run / stage / "environment.json").is_file()
    ]
    return " and ".join(dict.fromkeys(found))


def measured_once(
    target: Path,
    origin: Mapping[str, str],
    measure: Callable[[], Mapping[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What a report holds that was measured of the same code, text and model; else it is measured again, and said."""
    if target.is_file():
        try:
            found = json.loads(target.read_bytes())
            before = found.get("origin", {})
        except (ValueError, RecursionError, AttributeError):
            found, before = {}, {}
        if before == origin:
            return dict(found)
        say(f"{target} was made of {differences(before, origin)}: measured again")
    save_report(target, {**measure(), "origin": dict(origin)})
    return dict(json.loads(target.read_bytes()))


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two origins, in words, both named."""
    return ", ".join(
        f"{name} {before.get(name, '')[:SHOWN] or 'unknown'}, not {now[name][:SHOWN] or 'unknown'}"
        for name in now
        if before.get(name) != now[name]
    )


def say_other_code(rows: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> None:
    """Say which rows of a table were trained by other code than this."""
    by_code: dict[str, list[str]] = {}
    for row in rows:
        by_code.setdefault(row["origin"]["trained"][:SHOWN] or "unknown", []).append(row["name"])
    if set(by_code) - {code_fingerprint()[:SHOWN]}:
        named = "; ".join(f"{code}: {', '.join(names)}" for code, names in by_code.items())
        say(
            f"not all were trained by this code, {code_fingerprint()[:SHOWN]} (remove a run to train it again): {named}"
        )


def check_pair(config: Config, path: Path, other: Config, other_path: Path) -> None:
    """Raise ConfigError unless two configs read the same text, split alike: their runs are compared."""
    for key in TEXT_SETTINGS:
        name = key.removeprefix("data.")
        values = getattr(config.data, name), getattr(other.data, name)
        if values[0] != values[1]:
            raise ConfigError(
                f"{path} has {key}={values[0]!r}, {other_path} has {values[1]!r}: they are compared, so both must "
                "read the same text"
            )


def inherited(
    config: Config, files: Sequence[Path], overrides: Sequence[str], name: str, root: Path = Path("runs")
) -> tuple[Config, list[str]]:
    """A config over the settings that stage one of the run of that name was trained with, and those it took over.

    config: what files and overrides say on their own, returned as it is where there is no such stage one
    The second is as it would be typed: data.path="x.txt". Raises ConfigError where it would take over code.
    """
    path = root / name / "autoencoder" / "config.yaml"
    if not path.is_file():
        return config, []
    found = load_config(files, overrides, inherited=[path])
    before, now = dotted(to_dict(config)), dotted(to_dict(found))
    for key in plugins.SETTINGS:  # a folder may come from anyone, and its word is not its user's
        if now[key] != before[key] and is_own(now[key]):
            raise ConfigError(
                f"{path.parent} was trained with code of its own, which is not run unasked: read it, and give "
                f"{key}={now[key]} again"
            )
    differing = [f"{key}={json.dumps(value)}" for key, value in now.items() if before[key] != value]
    return found, differing


def require_shared_text(run: Path, other: Path) -> None:
    """Raise ConfigError unless two runs were trained on the same text, split alike."""
    stages = run / "autoencoder", other / "autoencoder"
    trained = [read_totals(stage).corpus if (stage / "totals.json").is_file() else "" for stage in stages]
    if all(trained) and trained[0] != trained[1]:
        raise ConfigError(
            f"{run} was trained on a text of fingerprint {trained[0][:SHOWN]}, {other} on {trained[1][:SHOWN]}: "
            "what is compared must have been trained on the same text"
        )
    if not all(trained):  # a run of before fingerprints were kept: its settings are all that is known
        check_settings(stages[1], to_dict(config_of_run(run)), only=TEXT_SETTINGS)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
