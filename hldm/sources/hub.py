"""Documents of Hugging Face datasets: from the hub, from its cache, or from a local dataset folder.

Whatever goes wrong, in the network or in a dataset's own files, becomes one line that names the cause and the file.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from hldm.config import ConfigError, DataConfig
from hldm.sources.notes import first_line, one_line
from hldm.sources.rows import text_of

HUB_TIMEOUT_S = 4.0
_OTHER_WAYS = "set data.path to files you have, or leave both empty for the built-in corpus"
# as builders of datasets name it
_FILE_VARIABLES = ("file", "filepath", "file_path", "filename", "original_file")


def read_dataset(config: DataConfig) -> Iterator[bytes | ValueError]:
    """Rows of a dataset; a ValueError for one that holds no text. Raises ValueError where reading fails."""
    place = _require_dataset(config)
    for _, row in _rows_of(config, lambda: _open_dataset(config), f"{place} ({config.split})", 0):
        yield row


def dataset_parts(
    config: DataConfig,
) -> tuple[list[str], Callable[[int, int], Iterator[tuple[int, bytes | ValueError]]], str]:
    """A dataset to be streamed: the names of its parts, what reads one from a row on, and a fingerprint.

    What reads gives the number of each row in its part, from 1, and its text or a ValueError.
    """
    place = _require_dataset(config)
    with _one_voice(), _errors_named(place, lambda: 0):
        rows = _open_dataset(config)
        if not hasattr(rows, "num_shards") or not hasattr(rows, "shard") or hasattr(rows, "__len__"):
            rows = rows.to_iterable_dataset(num_shards=max(1, min(len(rows) // 1000, 64)))
        parts = int(rows.num_shards)
        known = [rows.info.dataset_size, rows.info.download_size, str(rows.info.version), parts]
    names = [f"{place} ({config.split}) part {index + 1} of {parts}" for index in range(parts)]

    def read(index: int, first: int) -> Iterator[tuple[int, bytes | ValueError]]:
        def start() -> Any:
            part = rows.shard(num_shards=parts, index=index)
            return part.skip(first) if first else part

        return _rows_of(config, start, names[index], first)

    words = "\n".join(map(str, [config.dataset, config.subset, config.split, *known]))
    return names, read, hashlib.sha256(words.encode("utf-8", "surrogateescape")).hexdigest()


def _require_dataset(config: DataConfig) -> str:
    """What a dataset is called in messages. Raises ConfigError where it is a script or cannot be reached."""
    place = f"data.dataset={config.dataset}"
    is_offline = any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )
    is_local = Path(config.dataset).exists()
    if is_local:
        _require_no_script(Path(config.dataset), place)
    elif not is_offline:
        require_hub(place)  # datasets itself tries five times, half a minute

    return place


def _rows_of(
    config: DataConfig, start: Callable[[], Any], place: str, first: int
) -> Iterator[tuple[int, bytes | ValueError]]:
    """The number of each row, from first + 1 on, and its text or why there is none."""
    number = first
    with _one_voice(), _errors_named(place, lambda: number):
        for number, row in enumerate(start(), start=first + 1):
            yield number, text_of(row, config.field, f"{place} row {number}", config.question)


@contextmanager
def _errors_named(place: str, rows: Callable[[], int]) -> Iterator[None]:
    """Within: whatever goes wrong becomes one line. rows: how many have been read"""
    try:
        yield
    except MemoryError:
        raise
    # Exception: what the network layer, a decompressor or a format's reader raises has no common base
    except Exception as error:
        if not rows():
            name = place.partition(" (")[0]
            raise ConfigError(f"{name} cannot be read ({_causes(error)}); {_OTHER_WAYS}") from None
        raise ValueError(f"{place} row {rows() + 1}: reading stopped ({_causes(error)})") from None


def _open_dataset(config: DataConfig) -> Any:
    import datasets

    if (Path(config.dataset) / "state.json").exists():  # left by Dataset.save_to_disk
        return datasets.load_from_disk(config.dataset)
    if (Path(config.dataset) / "dataset_dict.json").exists():  # by DatasetDict.save_to_disk
        return datasets.load_from_disk(config.dataset)[config.split]
    return datasets.load_dataset(
        config.dataset, config.subset or None, split=config.split, streaming=config.stream
    )


def _require_no_script(place: Path, name: str) -> None:
    """Raise ConfigError for a dataset that is a program: datasets no longer runs them, and neither do we."""
    script = place if place.suffix == ".py" else place / f"{place.resolve().name}.py"
    if script.is_file():
        raise ConfigError(
            f"{name}: {script} is a dataset script, which datasets no longer runs: save its texts as .jsonl or "
            "parquet files and set data.path to them"
        )


@contextmanager
def _one_voice() -> Iterator[None]:
    """Within, datasets logs no error, which comes as an exception, too; without a terminal it draws no bar."""
    from datasets.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    if sys.stderr is None or not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def _causes(error: BaseException) -> str:
    """What an error says, what caused it, and the file that was being read, in one line.

    datasets wraps errors: "An error occurred while generating the dataset" hides both cause and file. The file is a
    local variable of the reader that failed.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    frames = [frame for link in chain for frame, _ in walk_tb(link.__traceback__)]
    found = [
        frame.f_locals.get(name)
        for frame in frames
        if frame.f_code.co_filename != __file__
        for name in _FILE_VARIABLES
    ]
    said = list(dict.fromkeys(map(_named, chain)))[:3]
    files = [str(file) for file in found if isinstance(file, (str, Path))]
    named = [file for file in files if not any(Path(file).name in words for words in said)]
    return "; ".join([*said, *(f"in {one_line(file)[:200]}" for file in named[-1:])])


def _named(error: BaseException) -> str:
    """What an error says, and its class where that says more."""
    words = first_line(error)
    is_plain = type(error).__name__ in words or isinstance(error, (OSError, ValueError))
    return words if is_plain else f"{type(error).__name__}: {words}"


def require_hub(place: str) -> None:
    """Raise ConfigError within HUB_TIMEOUT_S when the hub does not answer."""
    if failure := hub_failure():
        raise ConfigError(
            f"{place}: {failure}; {_OTHER_WAYS} (HF_HUB_OFFLINE=1 reads a copy downloaded before)"
        )


def hub_failure() -> str:
    """Why the hub does not answer within HUB_TIMEOUT_S, in words; "" where it does."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    failure: list[str] = [f"no answer in {HUB_TIMEOUT_S:g} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
            failure.clear()
        except urllib.error.HTTPError as error:  # below 500 the hub has answered
            failure[:] = [first_line(error)] if error.code >= 500 else []
        except (
            Exception
        ) as error:  # a thread has nowhere to report it; http.client's are neither OSError nor ValueError
            reason = getattr(error, "reason", error)
            failure[:] = [first_line(reason) if isinstance(reason, BaseException) else one_line(str(reason))]

    # in a thread, because looking up a name has no timeout of its own
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    return f"{endpoint} cannot be reached ({failure[0]})" if failure else ""
