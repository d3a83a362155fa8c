"""Parts of a user's own, which a setting names as `module:Class`: whose code may run, and the import of it.

Code runs where someone asked for it. A config that is trained is its user's own word, and names it plainly. A saved
folder may come from anyone: what it names is not imported unless `--allow-code`, `allow_code=True` or
HLDM_ALLOW_CODE=1 says so. A module is looked for on sys.path, then in the working directory, never in the folder.
Knows no part: what each must provide is checked where it is used (hldm.chunking.own, hldm.generation.own_prior).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hldm.config import Config
from hldm.settings import ConfigError, is_own

VARIABLE = "HLDM_ALLOW_CODE"
ALL = "*"
SETTINGS = ("chunking.strategy", "prior.denoiser", "prior.plugin")  # where a config may name one

T = TypeVar("T")

_allowed: set[str] = set()  # module:Class, or ALL


def allow(names: Iterable[str]) -> None:
    """Let the code of these (`module:Class`, or ALL) run in this process, from now on."""
    _allowed.update(names)


def named(config: Config) -> list[str]:
    """The classes of the user's own that a config names."""
    return [n for n in (config.chunking.strategy, config.prior.denoiser, config.prior.plugin) if is_own(n)]


def allow_named(config: Config) -> None:
    """Let the code run that a config names: training it is asking for it."""
    allow(named(config))


@contextmanager
def scope() -> Iterator[None]:
    """What is allowed within, is so within alone: a command's flag is that command's."""
    before = set(_allowed)
    try:
        yield
    finally:
        _allowed.clear()
        _allowed.update(before)


def named_in(saved: Mapping[str, Any]) -> dict[str, str]:
    """The own classes that the config.json of a saved model names, by setting."""
    found = {}
    for setting in SETTINGS:
        section, key = setting.split(".")
        inner = saved.get(section)
        value = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(value, str) and is_own(value):
            found[setting] = value
    return found


def require_consent(name: str, source: str) -> None:
    """Raise ConfigError, which names module and flag, unless the code of this class may run.

    source: what asks for it, as `runs/demo asks for`
    """
    if not {name, ALL} & _allowed and os.environ.get(VARIABLE) != "1":
        raise ConfigError(
            f"{source} code of its own, {name}, which is not run unasked: read the module "
            f"{name.partition(':')[0]}, then pass --allow-code (allow_code=True in Python, {VARIABLE}=1 in the "
            "environment)"
        )


def load(name: str, setting: str) -> type:
    """The class that a setting names. Raises ConfigError, one line, where it may not run or is not there."""
    found = _load(name, setting)
    if not isinstance(found, type):
        raise ConfigError(_lacks(name, setting, "class"))
    return found


def load_function(name: str, setting: str) -> Callable[..., Any]:
    """The function that a setting names, `module:function`. Raises ConfigError as `load` does."""
    found = _load(name, setting)
    if not callable(found):
        raise ConfigError(_lacks(name, setting, "function"))
    return found


def _load(name: str, setting: str) -> Any:
    """Whatever stands under a name in the module that it is of; None for nothing."""
    where = f"{setting}={name}"
    require_consent(name, f"{where} is")
    module_name, _, own_name = name.partition(":")
    here = os.getcwd()
    sys.path.append(here)  # at the end: no file that lies about can stand in for a library
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):  # a library that it imports
            raise ConfigError(f"{where}: {module_name} needs {error.name}, which is not installed") from None
        raise ConfigError(f"{where}: no module {module_name} on sys.path or in {here}") from None
    except Exception as error:  # whatever its first lines do
        raise ConfigError(f"{where}: importing {module_name} failed with {described(error)}") from error
    finally:
        sys.path.remove(here)
    return getattr(module, own_name, None)


def _lacks(name: str, setting: str, kind: str) -> str:
    module_name, _, own_name = name.partition(":")
    file = getattr(sys.modules[module_name], "__file__", None) or "a built-in module"
    return f"{setting}={name}: {file} has no {kind} {own_name}"


def require_methods(cls: type, protocol: type, where: str) -> None:
    """Raise ConfigError that names what a class lacks of a protocol."""
    wanted = [name for name, value in vars(protocol).items() if callable(value) and not name.startswith("_")]
    if missing := [name for name in wanted if not callable(getattr(cls, name, None))]:
        raise ConfigError(
            f"{where} lacks {', '.join(missing)}: see {protocol.__module__}.{protocol.__qualname__}"
        )


def called(where: str, function: Callable[..., T], *arguments: Any) -> T:
    """What the user's function returns; ConfigError, one line with its file and line, for what it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        raise ConfigError(f"{where} failed with {described(error)}") from error


def described(error: BaseException) -> str:
    """An error of the user's code in one line: its kind, what it says, where it was raised."""
    said = " ".join(str(error).split())[:200]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {said or 'no message'}{place}"


def source_of(cls: type) -> str:
    """sha256 of the file that a class is defined in, 16 hex digits; "" where it has none."""
    path = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else ""
