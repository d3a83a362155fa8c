"""Models as folders that `save_pretrained` writes, checked whole before a weight of them is used.

    config.json  diffusion_pytorch_model.safetensors

diffusers takes what it finds: a pickled *.bin where no safetensors are, a fresh random tensor where one is
missing, the last of two tensors of one name. Here the file must hold exactly the tensors of the model that
its config describes, all finite; reading one never runs code. Knows no model by name.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ConfigMixin, ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hldm import plugins
from hldm.sources.notes import first_line

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
MAX_JSON_BYTES = 1_000_000  # a config is a page
MAX_HEADER_BYTES = 10_000_000  # of safetensors; 100 bytes a tensor, and the deepest model has 10,000
SAVED_BY_DIFFUSERS = {"_class_name", "_diffusers_version", "_name_or_path"}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "dict": (dict,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
}

NEVER = 2**62  # bytes of a shard: weights are one file
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{letter}I": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)
}

M = TypeVar("M", bound="SavedModel")


class SavedModel(ModelMixin, ConfigMixin):
    """A diffusers model that is read from a folder on disk or not at all."""

    config_name = CONFIG

    @classmethod
    def from_pretrained(
        cls: type[M], folder: str | Path, *, torch_dtype: Any = None, allow_code: bool = False
    ) -> M:
        """The model that `save_pretrained` wrote to a folder, in float32.

        allow_code: import the classes of someone's own that it names, if any (hldm.plugins)
        Raises FileNotFoundError for a folder without a model, ValueError for one that is not exactly as saved, or for
        another dtype.
        """
        require_float32(torch_dtype)
        require_consent_of(Path(folder), allow_code)
        with default_float32():
            check_model(cls, Path(folder))
            return super().from_pretrained(str(folder), use_safetensors=True, local_files_only=True)

    def save_pretrained(
        self,
        folder: str | Path,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write config and weights. Raises ValueError, before anything is written, for what could not be loaded."""
        check_save([self], safe_serialization, variant, max_shard_size)
        super().save_pretrained(str(folder), is_main_process, max_shard_size=NEVER)

    def to_json_string(self) -> str:
        """config.json, without the path that the model was loaded from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def require_float32(dtype: Any) -> None:
    """Raise ValueError for a dtype, or its name, that models are not computed in. None, "auto": as saved."""
    name = str(dtype).removeprefix("torch.")
    if name not in ("None", "auto", "float32", "float"):
        raise ValueError(
            f"hldm computes in float32, got {name}: float16 overflows, bfloat16 writes 20 times slower; "
            "with torch.autocast(device, torch.bfloat16) around a call works"
        )


@contextmanager
def default_float32() -> Iterator[None]:
    """Within, new tensors are float32, whatever torch.set_default_dtype says."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_save(
    models: Iterable[nn.Module],
    safe_serialization: bool,
    variant: str | None,
    max_shard_size: int | str | None,
) -> None:
    """Raise ValueError where weights, or the form they are to be saved in, could not be loaded again."""
    if not safe_serialization:
        raise ValueError(
            "weights are saved as safetensors alone (safe_serialization=True): a pickle can run code"
        )
    if variant is not None:
        raise ValueError(f"weights have one form, float32, and no variant={variant!r}: leave it out")
    most = NEVER if max_shard_size is None else _bytes_of(max_shard_size)
    for model in models:
        state = model.state_dict()
        for name, tensor in state.items():
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {tensor.dtype}, weights are saved in float32: call .to(torch.float32)"
                )
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} is not finite everywhere: such weights are not saved")
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        if size > most:
            raise ValueError(
                f"weights are saved as one file, here of {size:,} bytes: max_shard_size={max_shard_size!r} is less"
            )


def _bytes_of(size: int | str) -> int:
    """5_000_000 or "5MB" or "5MiB" in bytes."""
    parts = re.fullmatch(r"([0-9]+)\s*([KMGT]I?|)B?", str(size).upper().strip())
    if parts is None:
        raise ValueError(f"max_shard_size must be bytes or such as '5GB', got {size!r}")
    return int(parts[1]) * UNITS[parts[2]]


def require_consent_of(folder: Path, allow_code: bool = False) -> None:
    """Raise ConfigError where a model in this folder, or right below it, names a class of someone's own.

    allow_code: allow what they name instead, in this process. A config that cannot be read names nothing.
    """
    for path in sorted((*folder.glob(CONFIG), *folder.glob(f"*/{CONFIG}"))):
        try:
            names = plugins.named_in(read_json(path)).values()
        except (ValueError, OSError):
            continue  # loading it reports what is wrong with it
        if allow_code:
            plugins.allow(names)
        for name in names:
            plugins.require_consent(name, f"{folder} asks for")


def check_model(cls: type[SavedModel], folder: Path) -> None:
    """Raise ValueError, one line, unless a folder holds a model of this class, whole and finite."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():  # a FIFO would be read for ever
            raise FileNotFoundError(
                f"{folder} holds no model: {name} is missing; train it again or restore it"
            )
    if index := next(folder.glob("*.index.json"), None):  # diffusers would read what that names instead
        raise ValueError(f"{index} says that the weights are in several files: save them as one")
    state = _describe(cls, folder / CONFIG)
    expected = {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in state.items()}
    check_tensors(folder / WEIGHTS, expected)


def _describe(cls: type[SavedModel], path: Path) -> dict[str, Tensor]:
    """The state of the model that a config describes, without memory of its own."""
    config = read_json(path)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if config.get("_class_name") != cls.__name__:
        raise ValueError(
            f"{path}: expected the config of a {cls.__name__}, got {config.get('_class_name')!r:.80}"
        )
    if unknown := sorted(config.keys() - SAVED_BY_DIFFUSERS - {p.name for p in parameters}):
        raise ValueError(f"{path}: unknown key {unknown[0]!r:.80}; train the model again or restore the file")
    arguments = {key: value for key, value in config.items() if key not in SAVED_BY_DIFFUSERS}
    for parameter in parameters:
        if parameter.name in arguments:
            value, types = arguments[parameter.name], JSON_TYPES[str(parameter.annotation)]
            if not isinstance(value, types) or isinstance(value, bool):
                raise ValueError(
                    f"{path}: {parameter.name} must be of type {parameter.annotation}, got {value!r:.80}"
                )
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"{path}: {parameter.name} is missing; train the model again or restore the file"
            )
    try:
        with torch.device("meta"):
            return cls(**arguments).state_dict()
    except (ValueError, RuntimeError) as error:  # RuntimeError: a tensor of more than 2^63 bytes
        raise ValueError(f"{path} describes no model: {first_line(error)}") from None


def check_tensors(path: Path, expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise ValueError unless a safetensors file holds these tensors and no others, every number finite.

    expected: name -> (dtype as safetensors writes it, shape)
    """
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            for word, names in (("missing", expected.keys() - found), ("unknown", found - expected.keys())):
                if names:
                    raise ValueError(f"{path}: {word} tensor {min(names)!r:.80}, {len(names)} in all")
            for name, kind in expected.items():
                part = file.get_slice(name)
                if (part.get_dtype(), tuple(part.get_shape())) != kind:
                    raise ValueError(
                        f"{path}: tensor {name!r:.80} must be {kind[0]} {kind[1]}, "
                        f"got {part.get_dtype()} {tuple(part.get_shape())}"
                    )
            for name in expected:
                if not file.get_tensor(name).isfinite().all():
                    raise ValueError(f"{path}: tensor {name!r:.80} is not finite everywhere")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({first_line(error)}): restore it or train the model again"
        ) from None


def _check_header(path: Path) -> None:
    """Of two tensors of one name safetensors takes the last: refuse them, and a header too large to read."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size):
            raise ValueError(
                f"{path} is damaged (its header claims {size:,} bytes): restore it or train it again"
            )
        parse_json(file.read(size), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file. Raises ValueError, one line, for anything else."""
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: longer than {MAX_JSON_BYTES:,} bytes: restore it")
    return parse_json(data, str(path))


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """The object in a JSON text; a key twice is refused. Raises ValueError, one line, naming the source."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands there twice")
        return found

    try:
        value = json.loads(data, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not readable JSON ({first_line(error)}): restore it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, got a {type(value).__name__}: restore it")
    return value
