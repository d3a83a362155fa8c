"""Sections of settings, and the YAML files, `a.b=c` overrides and dicts they are read from, strictly.

A value stays the text that was written until the field it ends up in decides its type: `1e-3` is a
number where a number is wanted and `no` a word where a word is wanted, and YAML 1.1 gets both wrong.
What a settings file has no use for (aliases, tags, several documents, null) is refused, like an unknown
key or a wrong value, in one line with file, line and column. Knows no setting by name.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce, wraps
from itertools import takewhile
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

MAX_FILE_BYTES = 100_000  # a config is a page; anything this long is not one, and takes a second to parse
MAX_DEPTH = 50  # the config tree is 4 deep; bounds every recursion below

COMMAND_LINE = "command line"

OWN_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)

S = TypeVar("S", bound="Section")


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line for the user."""


class Setting(NamedTuple):
    """A value as written, and where: `configs/tiny.yaml:3:8`, `command line`, or a dict of settings."""

    value: Any
    where: str = "settings"


class Dumpable(Protocol):
    """What can be written as plain values, as every Section can."""

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class Section(BaseModel):
    """A group of settings, frozen and checked when it is made; a ConfigError names what is wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _checked(self: S) -> S:
        self.check()
        return self

    def check(self) -> None:
        """Raise ValueError where fields that are right by themselves disagree; it opens with a field's name."""

    # wraps copies a mark of pydantic's, without which an inner section would raise before its whole key is known.
    @wraps(BaseModel.__init__)  # type: ignore[misc]
    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            name = type(self).__name__.removesuffix("Config").lower()
            raise ConfigError(_refusal(error, f"{name}." if name else "")[1]) from None


def is_own(name: str) -> bool:
    """Whether a setting names a class of the user's own, as `module:Class` (hldm.plugins)."""
    return OWN_CLASS.fullmatch(name) is not None


def changed(section: S, **changes: Any) -> S:
    """A copy with some fields replaced, checked like a new one."""
    return type(section)(**vars(section) | changes)


def read_settings(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Setting]:
    """Settings of YAML files by dotted key, then those of the command line; later wins."""
    settings: dict[str, Setting] = {}
    for path in files:
        settings |= _read_file(Path(path))
    for override in overrides:
        settings |= parse_override(override)
    return settings


def _read_file(path: Path, heirs: int = 0) -> dict[str, Setting]:
    """Settings of a YAML file by dotted key, over those of the file its `base:` names, if any.

    heirs: how many files inherit from this one
    """
    settings = parse_settings(_read_text(path), str(path))
    base = settings.pop("base", None)
    if base is None:
        return settings
    name = str(base.value)
    if not name.isprintable():  # a NUL, half a surrogate pair
        raise ConfigError(f"{base.where}: base {reprlib.repr(name)} cannot be the name of a file")
    if heirs == MAX_DEPTH:
        chain = f"ends a chain of more than {MAX_DEPTH} bases; does one inherit from itself?"
        raise ConfigError(f"{base.where}: base {name[:100]!r} {chain}")
    return _read_file(path.parent / name, heirs + 1) | settings


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
    try:
        events = _events(text, source)
        next(events)  # the start of the stream
        if isinstance(next(events), yaml.DocumentStartEvent):  # else an empty file
            _collect(events, key, settings, starts={})
            next(events)  # the end of the document
            if not isinstance(after := next(events), yaml.StreamEndEvent):
                raise ConfigError(f"{_where(after.start_mark)}: not valid YAML: expected a single document")
    except yaml.MarkedYAMLError as error:
        where = _where(error.problem_mark) if error.problem_mark else source
        problem = " ".join(f"{error.context or ''} {error.problem}".split())
        hint = "; quote a value that opens with * or &" if "alias" in problem else ""
        raise ConfigError(f"{where}: not valid YAML: {problem}{hint}") from None
    except yaml.reader.ReaderError as error:
        before, code = text[: error.position], int(error.character)
        where = f"{source}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        if 0xDC80 <= code <= 0xDCFF:  # how _read_text hands on a byte that is not UTF-8
            raise ConfigError(f"{where}: byte 0x{code - 0xDC00:02x} is not UTF-8; save it as UTF-8") from None
        raise ConfigError(f"{where}: the character {chr(code)!r} is not allowed in YAML") from None
    return settings


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"lanes": 16}} as {"data.lanes": 16}."""
    if prefix.count(".") > MAX_DEPTH:
        raise ConfigError(f"settings: nested deeper than {MAX_DEPTH}, which no config is")
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        is_inner = isinstance(value, Mapping)
        leaves |= dotted(value, f"{prefix}{key}.") if is_inner else {f"{prefix}{key}": value}
    return leaves


def build_section(cls: type[S], settings: Mapping[str, Setting], section: str = "") -> S:
    """The section with these settings, at any depth, over its defaults.

    section: what stands before its keys in a message, such as `prior.`; nothing for the whole config
    Raises ConfigError for an unknown key and for whatever the section refuses.
    """
    tree = cls().model_dump()
    values = dotted(tree)
    for key, setting in settings.items():
        if key in values:
            *sections, name = key.split(".")
            reduce(getitem, sections, tree)[name] = _typed(setting.value, type(values[key]))
            continue
        inner = [known for known in values if known.startswith(f"{key}.")]
        if not inner:
            nearest = section + _nearest_key(key[:100], values)
            unknown = section + key[:100]
            raise ConfigError(f"{setting.where}: unknown key {unknown!r}; the nearest known is {nearest!r}")
        if setting.value != "":  # else a section with nothing below it, as when all is commented out
            below = f"set the keys below it, such as {section}{inner[0]}"
            raise ConfigError(f"{setting.where}: {section}{key} is a section; {below}")
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        named, message = _refusal(error, section)
        where = next((f"{settings[key].where}: " for key in named if key in settings), "")
        raise ConfigError(f"{where}{message}") from None


_EXPECTED = {  # instead of pydantic's words, by its type of error
    "int_type": "must be a whole number in digits",
    "float_type": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list such as [a, b]",
    "extra_forbidden": "is no setting",
}


def _refusal(error: ValidationError, section: str) -> tuple[list[str], str]:
    """The keys that the first of pydantic's errors is about, and a line that says what is wrong."""
    first = error.errors(include_url=False)[0]
    key = ".".join(part for part in first["loc"] if isinstance(part, str))  # without the index into a list
    if first["type"] == "value_error":  # of a check between fields, which knows their names in the section
        inside, problem = f"{key}." if key else "", str(first["ctx"]["error"])
        return [inside + word for word in re.findall(r"[\w.]+", problem)], f"{section}{inside}{problem}"
    expected = _EXPECTED.get(first["type"]) or re.sub("^(Input|Tuple) should", "must", first["msg"])
    expected = re.sub("greater than or equal to", "at least", expected)
    expected = re.sub("less than or equal to", "at most", expected)
    return [key], f"{section}{key} {expected}, got {reprlib.repr(first['input'])}"


def _typed(value: Any, kind: type) -> Any:
    """Text as a value of the kind that its field holds; as it is where it is none."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    if kind is bool:
        return {"true": True, "false": False}.get(value, value)
    try:
        return kind(value) if kind in (int, float) else value
    except ValueError:
        return value


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read as a config: {reason}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: longer than {MAX_FILE_BYTES} bytes, which no config is")
    return data.decode("utf-8", "surrogateescape")  # what is not UTF-8 is a character that YAML refuses


def _events(text: str, source: str) -> Iterator[yaml.Event]:
    """What a YAML text consists of, in order; anchors, aliases and tags are refused."""
    loader = yaml.SafeLoader(text)
    loader.name = source  # of every mark from here on
    for event in iter(loader.get_event, None):
        if getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None:
            problem = "anchors, aliases and tags are refused; quote a value that opens with * & or !"
            raise ConfigError(f"{_where(event.start_mark)}: {problem}")
        yield event


def _collect(
    events: Iterator[yaml.Event], key: str, settings: dict[str, Setting], starts: dict[str, str]
) -> None:
    """Put the value that comes next into `settings`; `starts` has every key so far and where it stands."""
    event = next(events)
    if isinstance(event, yaml.MappingStartEvent):
        while not isinstance(name := next(events), yaml.MappingEndEvent):
            at = _where(name.start_mark)
            inner = f"{key}.{_scalar(name)}" if key else _scalar(name)
            if inner in starts:
                raise ConfigError(f"{at}: duplicate key {inner[:100]!r}, first set at {starts[inner]}")
            if inner.count(".") >= MAX_DEPTH:
                raise ConfigError(f"{at}: nested deeper than {MAX_DEPTH}, which no config is")
            starts[inner] = at
            _collect(events, inner, settings, starts)
    elif not key:
        raise ConfigError(f"{_where(event.start_mark)}: expected lines of `key: value`")
    elif isinstance(event, yaml.SequenceStartEvent):
        items = takewhile(lambda item: not isinstance(item, yaml.SequenceEndEvent), events)
        settings[key] = Setting([_scalar(item) for item in items], _where(event.start_mark))
    else:
        settings[key] = Setting(_scalar(event), _where(event.start_mark))


def _scalar(event: yaml.Event) -> str:
    where = _where(event.start_mark)
    if not isinstance(event, yaml.ScalarEvent):
        raise ConfigError(f"{where}: expected a single value, found a list or a mapping")
    if event.style is None and event.value in ("~", "null", "Null", "NULL"):  # style None: not quoted
        raise ConfigError(f"{where}: null is no setting; leave the key out to keep its default")
    return event.value


def _where(mark: Any) -> str:
    return mark.name if mark.name == COMMAND_LINE else f"{mark.name}:{mark.line + 1}:{mark.column + 1}"


def _nearest_key(key: str, known_keys: Mapping[str, Any]) -> str:
    """The known key most alike, as a whole or in its last word (`steps` is generation.steps)."""

    def likeness(known: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, key, known).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        return max(whole, last), whole

    return max(known_keys, key=likeness)
