"""YAML files, `a.b=c` overrides and dicts, read strictly into a tree of dataclasses.

A value stays the text that was written until the field it ends up in decides its type: `1e-3` is a
number where a number is wanted and `no` a word where a word is wanted, and YAML 1.1 gets both wrong.
What a settings file has no use for (aliases, tags, several documents, null) is refused, like an unknown
key or a wrong type, in one line with file, line and column. Knows no setting by name.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

MAX_FILE_BYTES = 1_000_000  # a config is a page; anything this long is not one
MAX_VALUES = 5000  # the config tree has 100, and two lists of at most 512; 500,000 took minutes
MAX_DEPTH = 50  # the config tree is 4 deep; bounds every recursion below

COMMAND_LINE = "command line"

Located = tuple[yaml.Event, str]  # an event of the YAML parser, and where it starts
T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line for the user."""


class Setting(NamedTuple):
    """A value as written, and where: `configs/tiny.yaml:3:8` or `command line`."""

    value: str | list[str]
    where: str


def read_settings(path: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Setting]:
    """Settings of a YAML file by dotted key, over those of the file its `base:` names, if any.

    heirs: the files that inherit from this one, to find a circle.
    """
    settings = parse_settings(_read_text(path), str(path))
    base = settings.pop("base", None)
    if base is None:
        return settings
    heirs += (path.resolve(),)
    if len(heirs) > MAX_DEPTH:
        raise ConfigError(f"{base.where}: a chain of more than {MAX_DEPTH} bases, which no config has")
    base_path = path.parent / str(base.value)
    try:
        is_circle = base_path.resolve() in heirs
    except (OSError, ValueError, RuntimeError):  # a NUL, half a surrogate pair, a circle of links
        raise ConfigError(
            f"{base.where}: base {reprlib.repr(base.value)} cannot be the name of a file"
        ) from None
    if is_circle:
        raise ConfigError(f"{base.where}: base {reprlib.repr(base.value)} inherits from itself")
    return read_settings(base_path, heirs) | settings


def parse_override(override: str) -> dict[str, Setting]:
    """Settings of one `a.b=c`; a value that opens with [ { or a quote is YAML, any other is plain text."""
    key, equals, value = override.partition("=")
    if not key or not equals:
        raise ConfigError(f"{COMMAND_LINE}: expected key=value, such as seed=1, got {override[:100]!r}")
    if any("\ud800" <= letter <= "\udfff" for letter in override):  # what Python makes of bytes not UTF-8
        raise ConfigError(f"{COMMAND_LINE}: {override[:100]!r} is not UTF-8")
    if value.startswith(("[", "{", '"', "'")):
        return parse_settings(value, COMMAND_LINE, key)
    return {key: Setting(value, COMMAND_LINE)}


def parse_settings(text: str, source: str, key: str = "") -> dict[str, Setting]:
    """Settings of a YAML text by dotted key, each below `key`."""
    settings: dict[str, Setting] = {}
    events = _strict_events(text, source)
    first = next(events, None)
    if first is None:  # an empty file
        return settings
    if not key and not isinstance(first[0], yaml.MappingStartEvent):
        raise ConfigError(f"{first[1]}: expected lines of `key: value`")
    _collect(first, events, key, settings, starts={})
    for _ in events:  # whatever follows is refused there
        pass
    return settings


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Setting]:
    """Settings of a nested dict by dotted key."""
    settings: dict[str, Setting] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key.count(".") > MAX_DEPTH:
            raise ConfigError(f"settings: nested deeper than {MAX_DEPTH}, which no config is")
        if len(settings) > MAX_VALUES or (isinstance(value, list | tuple) and len(value) > MAX_VALUES):
            raise ConfigError(
                f"settings: {key[:100]} brings more than {MAX_VALUES} values, which no config has"
            )
        if isinstance(value, Mapping):
            settings |= flatten_settings(value, f"{key}.")
        elif isinstance(value, list | tuple):
            settings[key] = Setting([_as_text(key, item) for item in value], "settings")
        else:
            settings[key] = Setting(_as_text(key, value), "settings")
    return settings


def build_dataclass(cls: type[T], settings: Mapping[str, Setting]) -> T:
    """The tree of dataclasses with these settings over its defaults.

    Raises ConfigError for an unknown key, a value that is not of its field's type, a number that is not
    finite or has no place in 64 bits, and whatever the dataclasses themselves refuse.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    annotations = _leaf_annotations(cls)
    known = {key: setting for key, setting in settings.items() if _is_leaf(key, setting, annotations)}
    for key, setting in known.items():
        # OmegaConf would resolve ${...}, skip ??? and take any number for a bool
        is_bool = annotations[key] != "bool" or setting.value in ("true", "false")
        if "${" in str(setting.value) or setting.value == "???" or not is_bool:
            raise _wrong_type(key, setting, annotations[key])
    try:
        node = OmegaConf.merge(OmegaConf.structured(cls), _nest(known))
    except OmegaConfBaseException as error:
        key = str(error.full_key).partition("[")[0]  # without the index into a list
        raise _wrong_type(key, known[key], annotations[key]) from None
    for key, setting in known.items():
        value = OmegaConf.select(node, key)
        if isinstance(value, int | float) and not abs(value) < 2**63:  # written so as to catch NaN
            raise _wrong_type(key, setting, annotations[key])
    try:
        return _build_section(node, "")
    except ConfigError as error:
        named = re.findall(r"[\w.]+", str(error))
        where = next((f"{known[key].where}: " for key in named if key in known), "")
        raise ConfigError(f"{where}{error}") from None


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read as a config: {reason}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: longer than {MAX_FILE_BYTES} bytes, which no config is")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = _where_after(data[: error.start].decode("utf-8"), str(path))
        raise ConfigError(f"{where}: byte 0x{data[error.start]:02x} is not UTF-8; save it as UTF-8") from None


def _strict_events(text: str, source: str) -> Iterator[Located]:
    """The scalars and collections of a single document; anything else is refused."""
    depth = documents = values = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            assert event.start_mark is not None  # an event made by the parser has one
            where = _where(source, event.start_mark.line, event.start_mark.column)
            anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
            documents += isinstance(event, yaml.DocumentStartEvent)
            if documents > 1:
                raise ConfigError(f"{where}: a config is one document; remove the `---`")
            if anchor is not None:
                raise ConfigError(
                    f"{where}: anchors and aliases are refused; quote a value that opens with * or &"
                )
            if tag is not None:
                raise ConfigError(f"{where}: tags such as {tag[:100]!r} are refused")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH}, which no config is")
            values += isinstance(event, yaml.ScalarEvent)
            if values > MAX_VALUES:
                raise ConfigError(f"{where}: more than {MAX_VALUES} keys and values, which no config has")
            if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent | yaml.CollectionEndEvent):
                yield event, where
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = _where(source, mark.line, mark.column) if mark else source
        problem = " ".join(str(error.problem).split())
        hint = "; quote a value that opens with * or &" if "alias" in str(error.context) else ""
        raise ConfigError(f"{where}: not valid YAML: {problem}{hint}") from None
    except yaml.reader.ReaderError as error:
        where = _where_after(text[: error.position], source)
        raise ConfigError(f"{where}: the character {error.character!r} is not allowed in YAML") from None


def _collect(
    first: Located, events: Iterator[Located], key: str, settings: dict[str, Setting], starts: dict[str, str]
) -> None:
    """Put the node that `first` opens into `settings`; `starts` has every key so far and where it stands."""
    event, where = first
    if isinstance(event, yaml.MappingStartEvent):
        for name, at in events:
            if isinstance(name, yaml.MappingEndEvent):
                return
            inner = f"{key}.{_scalar_text(name, at)}" if key else _scalar_text(name, at)
            if inner in starts:
                raise ConfigError(f"{at}: duplicate key {inner[:100]!r}, first set at {starts[inner]}")
            starts[inner] = at
            _collect(next(events), events, inner, settings, starts)
    elif isinstance(event, yaml.SequenceStartEvent):
        values = []
        for item, at in events:
            if isinstance(item, yaml.SequenceEndEvent):
                break
            values.append(_scalar_text(item, at))
        settings[key] = Setting(values, where)
    else:
        settings[key] = Setting(_scalar_text(event, where), where)


def _scalar_text(event: yaml.Event, where: str) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise ConfigError(f"{where}: expected a single value, found a list or a mapping")
    if event.style is None and event.value in ("~", "null", "Null", "NULL"):  # style None: not quoted
        raise ConfigError(f"{where}: null is no setting; leave the key out to keep its default")
    return event.value


def _where(source: str, line: int, column: int) -> str:
    return source if source == COMMAND_LINE else f"{source}:{line + 1}:{column + 1}"


def _where_after(before: str, source: str) -> str:
    return _where(source, before.count("\n"), len(before) - before.rfind("\n") - 1)


def _as_text(key: str, value: Any) -> str:
    if not isinstance(value, bool | int | float | str):
        raise ConfigError(f"settings: {key[:100]} cannot be a {type(value).__name__}")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _nest(settings: Mapping[str, Setting]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, setting in settings.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = setting.value
    return tree


def _leaf_annotations(cls: Any, prefix: str = "") -> dict[str, str]:
    """Every dotted key of a tree of dataclasses, and the annotation of its field as written."""
    leaves: dict[str, str] = {}
    for f in fields(cls):
        default = None if f.default_factory is MISSING else f.default_factory()
        if is_dataclass(default):
            leaves |= _leaf_annotations(default, f"{prefix}{f.name}.")
        else:
            leaves[f"{prefix}{f.name}"] = str(f.type)
    return leaves


def _is_leaf(key: str, setting: Setting, annotations: Mapping[str, str]) -> bool:
    """Whether the key is a field; False for a section with nothing below it, as when all is commented out."""
    if key in annotations:
        return True
    inner = [known for known in annotations if known.startswith(f"{key}.")]
    if not inner:
        nearest = _nearest_key(key[:100], annotations)
        raise ConfigError(f"{setting.where}: unknown key {key[:100]!r}; the nearest known is {nearest!r}")
    if setting.value:
        raise ConfigError(f"{setting.where}: {key} is a section; set the keys below it, such as {inner[0]}")
    return False


def _nearest_key(key: str, known_keys: Mapping[str, str]) -> str:
    """The known key most alike, as a whole or in its last word (`steps` is generation.steps)."""

    def likeness(known: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, key, known).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        return max(whole, last), whole

    return max(known_keys, key=likeness)


_EXPECTED = {  # by annotation; for a Literal, its choices
    "int": "a whole number in digits",
    "float": "a finite number",
    "bool": "true or false",
    "str": "text without ${",
    "tuple[str, ...]": "a list such as [a, b]",
}


def _wrong_type(key: str, setting: Setting, annotation: str) -> ConfigError:
    expected = _EXPECTED.get(annotation) or f"one of {annotation.removeprefix('Literal[').removesuffix(']')}"
    if annotation == "float" and _is_finite(setting.value):
        expected = "a number below 2^63"
    return ConfigError(f"{setting.where}: {key} must be {expected}, got {reprlib.repr(setting.value)}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _build_section(node: Any, path: str) -> Any:
    """Build a section, inner ones first, so that what GriffinConfig says names the encoder it is in."""
    from omegaconf import DictConfig, OmegaConf

    for name in node:
        if isinstance(node[name], DictConfig):
            _build_section(node[name], f"{path}{name}.")
    try:
        return OmegaConf.to_object(node)
    except ConfigError as error:
        if not path:
            raise
        cls: Any = OmegaConf.get_type(node)
        noun = cls.__name__.removesuffix("Config").lower()
        raise ConfigError(re.sub(rf"\b{noun}\.", path, str(error))) from None
