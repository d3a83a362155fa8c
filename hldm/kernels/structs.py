"""The structs that kernels are called with: their fields read from the C++ itself, and filled by name."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hldm.kernels.library import SOURCES, library

_KINDS: dict[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}


class Struct(ctypes.Structure):
    """A struct whose fields are set to numbers, tensors, lists of tensors, arrays and other structs; None: not there.

    All of it is kept alive as long as the struct is.
    """

    def __init__(self, **values: Any):
        self.kept: dict[str, Any] = {}
        self.arrays: dict[str, Any] = {}
        # all at once: field by field took a tenth of the time to write a chunk
        super().__init__(**self._in_c(values))

    def fill(self, **values: Any) -> None:
        for name, value in self._in_c(values).items():
            setattr(self, name, value)

    def _in_c(self, values: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            self.kept[name] = value
            if isinstance(value, list):
                value = self.arrays[name] = pointers_to(value)
            if isinstance(value, Tensor):
                assert value.is_contiguous()
                value = value.data_ptr()
            found[name] = ctypes.addressof(value) if isinstance(value, ctypes.Array) else value
        return found


def pointers_to(tensors: Sequence[Tensor | None]) -> Any:
    """An array of the addresses of tensors, which must outlive it; null for None."""
    assert all([x is None or x.is_contiguous() for x in tensors])
    return (ctypes.c_void_p * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors])


def weights_of(*modules: Any) -> list[Tensor | None]:
    """Weight and bias of each module, as the kernels take them."""
    return [parameter for module in modules for parameter in (module.weight, module.bias)]


@cache
def struct(source: str, name: str) -> Any:
    """A struct of a file in hldm/kernels/cpp as a class of Struct: integers, doubles, other structs and pointers."""
    text = re.sub("//.*", "", (SOURCES / source).read_text(encoding="utf-8"))
    found = re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)
    assert found is not None
    fields = []
    for declaration in found[1].split(";")[:-1]:
        kind = declaration.split()[0]
        as_c = ctypes.c_void_p if "*" in declaration else _KINDS.get(kind) or struct("stack.h", kind)
        fields += [(re.findall(r"\w+", part)[-1], as_c) for part in declaration.split(",")]
    return type(name, (Struct,), {"_fields_": fields})


def run(kernel: str, call: Any) -> None:
    """A kernel with as many threads as torch has; call: the struct that it takes."""
    compiled = library()
    assert compiled is not None
    call.threads = torch.get_num_threads()
    getattr(compiled, kernel)(ctypes.byref(call))


def is_plain(x: Tensor | None) -> bool:
    """Whether the kernels can read a parameter where it is."""
    return x is not None and x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
