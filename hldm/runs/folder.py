"""A run is a folder: its settings, its environment, its metrics, and a lock so that one process writes.

    runs/demo/autoencoder/  config.yaml  environment.json  metrics.jsonl  samples.txt  checkpoints/  .lock

Knows no model.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import socket
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hldm.config import Config, ConfigError, config_of_run, to_dict
from hldm.retired import without_retired
from hldm.runs.checkpoints import checkpoints_in
from hldm.runs.files import atomic_write, naming
from hldm.runs.provenance import write_environment
from hldm.settings import Setting, dotted

if TYPE_CHECKING:
    from hldm.text.corpus import Corpus, Split

NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,64}")
OPENING = frozenset({"config.yaml", "environment.json", ".lock"})  # what a run that did nothing holds
VALIDATION = b'"event": "validation"'  # in a line of metrics.jsonl
SAMPLE_HEADER = re.compile(rb"^=== step (-?[0-9]+) ===$", re.MULTILINE)


@dataclass(frozen=True)
class Totals:
    """What a training has cost so far."""

    steps: int = 0
    seconds: float = 0.0
    characters: int = 0
    prepared: float = 0.0  # of the seconds, those before the first step
    corpus: str = ""  # fingerprint of the training text; "": a run of before it was kept
    autoencoder: str = ""  # of stage two: fingerprint of the stage one that it was trained on


class Run:
    """The folder of one stage of one run; made by `open_run`. Without `is_main` its methods write nothing."""

    def __init__(self, folder: Path, *, is_main: bool, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.is_main = is_main
        self._say = say
        self._lock: int | None = None  # file descriptor; the kernel drops the lock when the process ends

    def log(self, step: int, **metrics: float | int | str | bool | None) -> None:
        """Append one line to metrics.jsonl; "nan" and "inf", which JSON has not, are written as strings."""
        if self.is_main:
            line = {"step": step} | {name: finite_or_text(value) for name, value in metrics.items()}
            path = self.folder / "metrics.jsonl"
            with naming(path), open(path, "a", encoding="ascii") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def sample(self, step: int, text: str) -> None:
        """Append a text to samples.txt, indented below its step."""
        if self.is_main:
            indented = text.replace("\n", "\n    ").encode("utf-8", "backslashreplace")
            path = self.folder / "samples.txt"
            with naming(path), open(path, "ab") as file:
                file.write(b"=== step %d ===\n    %s\n" % (step, indented))

    def rewind(self, step: int, validated: int | None = None) -> None:
        """Drop metrics and samples after `step` (-1: all), as a resumed run will write them again.

        validated: step of the last validation that is known of, if earlier; those after it go, too
        So do lines that a kill tore; each is said.
        """
        if not self.is_main:
            return
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = []
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
                logged = _step_logged(line)
                if logged is None:
                    self._say(f"{path}: dropping line {number}, which is torn")
                elif logged <= (step if validated is None or VALIDATION not in line else validated):
                    kept.append(line)
            atomic_write(path, b"".join(kept))
        path = self.folder / "samples.txt"
        if path.exists():
            text = path.read_bytes()
            later = (match.start() for match in SAMPLE_HEADER.finditer(text) if int(match[1]) > step)
            atomic_write(path, text[: next(later, len(text))])

    def discard_if_unused(self) -> None:
        """Remove a folder that holds nothing but what `open_run` wrote, so that its name can be used again."""
        if self.is_main and {entry.name for entry in self.folder.iterdir()} <= OPENING:
            for name in OPENING:
                (self.folder / name).unlink(missing_ok=True)
            for folder in (self.folder, self.folder.parent):
                with suppress(OSError):  # not empty: it holds another stage
                    folder.rmdir()

    def close(self) -> None:
        """Let go of the folder before the process ends."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _acquire(self) -> None:
        """Take the folder's lock. Raises ValueError with the owner when another process holds it."""
        path = self.folder / ".lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ValueError(
                f"{self.folder} is in use by {owner}; wait until it ends or choose another --name"
            ) from error
        except OSError as error:  # some network filesystems have no locks
            self._say(f"{path} cannot be locked ({error.strerror}): see that no second process writes there")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock = descriptor
        # A forked data worker that outlives this process must not keep the lock alive.
        os.register_at_fork(after_in_child=self.close)


def open_run(
    folder: Path,
    *,
    config: dict[str, Any],
    resume: bool,
    is_main: bool = True,
    may_change: tuple[str, ...] = (),
    say: Callable[[str], None] = warnings.warn,
) -> Run:
    """Make or reopen the folder of one stage, `runs/<name>/<stage>`, and lock it for this process.

    config:     the resolved settings, as JSON could hold them; config.yaml holds those last used
    resume:     reopen a folder that is not empty; one that is empty starts from the beginning, and says so
    is_main:    rank 0; the other ranks get a Run that writes nothing, and check nothing
    may_change: prefixes of dotted keys that may differ on resume, e.g. ("training.", "logging.")
    A resumed run calls `Run.rewind` with the step it found in its checkpoint.
    Raises ValueError when the name is unfit, the folder is taken or locked, or other settings differ.
    """
    folder = Path(folder)
    for name in folder.absolute().parts[-2:]:
        check_run_name(name)
    run = Run(folder, is_main=is_main, say=say)
    if not is_main:
        return run
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run._acquire()
    except OSError as error:
        raise ValueError(f"{folder} cannot be used: {error.strerror}; choose another --name") from error
    is_empty = all(entry.name == ".lock" for entry in folder.iterdir())
    try:
        if not is_empty and not resume:
            saved = checkpoints_in(folder)
            found = f"has a checkpoint at step {max(saved)}" if saved else "is not empty"
            raise ValueError(f"{folder} {found}; pass --resume or choose another --name")
        if is_empty and resume:
            say(f"{folder} has nothing to resume; starting from the beginning")
        check_settings(folder, config, may_change)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        atomic_write(folder / "config.yaml", text)
        write_environment(folder, say)
    except BaseException:
        if is_empty:
            run.discard_if_unused()
        run.close()
        raise
    return run


def last_sample(run: Path) -> str:
    """The text that the last stage of a run wrote last, as samples.txt holds it; "" where there is none."""
    for stage in ("prior", "autoencoder"):
        path = run / stage / "samples.txt"
        if path.is_file():
            *_, text = SAMPLE_HEADER.split(path.read_bytes())
            return text.decode("utf-8", "replace").strip().replace("\n    ", "\n")
    return ""


def last_validation(run: Path) -> dict[str, float]:
    """The bound and its terms, bits a character, that the last stage of a run validated at last; {} if it did not."""
    found = validations_of(run, "prior") or validations_of(run, "autoencoder")
    return found[-1] if found else {}


def validations_of(run: Path, stage: str) -> list[dict[str, float]]:
    """The bound and its terms, bits a character, whenever a stage was validated, first to last."""
    path, opening = run / stage / "metrics.jsonl", "validation_"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [
        {
            name.removeprefix(opening): float(x)
            for name, x in json.loads(line).items()
            if name.startswith(opening)
        }
        for line in lines
        if VALIDATION in line
    ]


def read_totals(folder: Path) -> Totals:
    """What a stage cost, from its totals.json. Raises ConfigError for one that was saved untrained."""
    totals = Totals(**json.loads((folder / "totals.json").read_text(encoding="utf-8")))
    if totals.steps < 1:
        raise ConfigError(f"{folder} was saved without a step of training: remove it, and train it anew")
    return totals


def write_totals(folder: Path, totals: Totals) -> None:
    """Mark a stage as done: totals.json is the last file that it writes."""
    atomic_write(folder / "totals.json", json.dumps(asdict(totals)) + "\n")


def require_same_text(stage: Path, corpus: Corpus) -> None:
    """Raise ConfigError unless a stage was trained on this text; a run of before that was kept is believed."""
    path = stage / "totals.json"
    trained_on = read_totals(stage).corpus if path.is_file() else ""
    if trained_on not in ("", corpus.fingerprint):
        raise ConfigError(
            f"{stage} was trained on a text of fingerprint {trained_on[:12]}, {corpus.name} is now "
            f"{corpus.fingerprint[:12]}: restore the text it was trained on, or train anew"
        )


def corpora_of_run(folder: Path) -> dict[Split, Corpus]:
    """The splits of the text that a run was trained on. Raises OSError or ValueError where it is not here as it was."""
    from hldm.sources.corpora import load_corpora

    stage = folder / "autoencoder"
    if not (stage / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} does not say what it was trained on: pass --text with a file")
    try:
        corpora = load_corpora(config_of_run(folder).data)
        require_same_text(stage, corpora["train"])
    except (FileNotFoundError, ConfigError) as error:
        raise type(error)(f"{error}; or pass --text with a file to measure {folder} on that") from None
    return corpora


def training_text_of(folder: Path) -> bytes | None:
    """The training split of the text that a run was trained on; None, which is said, where it is not here as it was."""
    from hldm.sources.notes import first_line, note

    try:
        return corpora_of_run(folder)["train"].text.tobytes()
    except (OSError, ValueError) as error:
        reason = first_line(error).partition("; or pass --text")[0]
        left = "what compares with it is left out, such as the random passage beside ROUGE"
        note(f"the training text is not here ({reason}), so {left}")
        return None


def shipped(name: str) -> Path:
    """A folder of what comes with hldm. Raises FileNotFoundError in a copy without it."""
    folder = Path(__file__).parent.parent / "pretrained" / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: pass --run with a run that you have trained")
    return folder


def shipped_run(twin: bool = False) -> Path:
    """The trained run that comes with hldm, or its twin. Raises FileNotFoundError in a copy without it."""
    return shipped("small-twin" if twin else "small")


def check_run_name(name: str) -> None:
    """Raise ValueError unless the name can be a folder's and nothing else, such as ../elsewhere."""
    if not NAME.fullmatch(name):
        raise ValueError(f"a run is named by 1 to 64 of [A-Za-z0-9._-], got {name!r}; choose another --name")


def check_settings(
    folder: Path, config: dict[str, Any], may_change: tuple[str, ...] = (), only: tuple[str, ...] = ("",)
) -> None:
    """Refuse settings other than those that a stage was started with; nothing to compare with is no fault.

    may_change, only: prefixes of dotted keys that may differ, and of those that are compared at all
    Raises ValueError that names the keys that differ, with both values.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    try:
        started = dotted(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path} is damaged; restore it or choose another --name") from error
    now = dotted(config)
    compared = {
        key: Setting(value, str(path))
        for key, value in started.items()
        if key.startswith(only) and not key.startswith(may_change)
    }
    started = {key: setting.value for key, setting in without_retired(compared, now).items()}
    defaults = dotted(to_dict(Config()))  # of settings that there were none of when it was started
    changes = [
        f"{key} {_shown(started, key)} -> {_shown(now, key)}"
        for key in sorted(started.keys() | now.keys())
        if key.startswith(only) and not key.startswith(may_change)
        if started.get(key, defaults.get(key, ...)) != now.get(key, ...)
    ]
    if changes:
        raise ValueError(
            f"{folder} was started with other settings ({', '.join(changes)}); "
            "set them back or choose another --name"
        )


def _shown(settings: dict[str, Any], key: str) -> str:
    value = settings.get(key, "absent")
    return "''" if value == "" else str(value)


def _step_logged(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None when the line is torn."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if type(step) is int and line.endswith(b"\n") else None


def finite_or_text(value: float | int | str | bool | None) -> float | int | str | bool | None:
    """A number as JSON can hold it: "nan", "inf" and "-inf" are text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
