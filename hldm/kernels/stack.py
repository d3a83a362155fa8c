"""A Griffin stack as the kernels take it: its parameters where they are, and a state that they write over.

One position through a stack is one function in C++ (hldm/kernels/cpp/stack.h). In torch such a step is some hundred
operators on a few numbers each, and nearly all of its time is their overhead.
"""

from __future__ import annotations

import ctypes
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hldm.kernels.structs import is_plain, pointers_to, struct
from hldm.model.griffin import Griffin, ResidualBlock
from hldm.model.state import GriffinState


class Stack:
    """Where a stack's parameters are found, and where they were last."""

    def __init__(self, model: Griffin) -> None:
        # in the order that hldm/kernels/cpp/stack.h reads them, which is that of the modules; their dicts rather than
        # the parameters, which may be replaced by others
        modules = [module._parameters for module in model.modules()]
        self.places = [(module, name) for module in modules for name, p in module.items() if p is not None]
        self.is_recurrent = torch.tensor([kind == "recurrent" for kind in model.config.blocks])
        self.hidden = cast("ResidualBlock", model.blocks[0]).mlp.gate.out_features
        self.addresses: list[int] = []
        self.pointers: Any = None

    def find(self) -> bool:
        """Look where the parameters are now; False when the kernel cannot read them."""
        parameters = [place[name] for place, name in self.places]
        addresses = [0 if p is None else p.data_ptr() for p in parameters]
        if addresses != self.addresses:
            self.pointers = pointers_to(parameters) if all(is_plain(p) for p in parameters) else None
            self.addresses = addresses
        return self.pointers is not None

    def shape(self, model: Griffin, batch: int) -> Any:
        """Sizes in the order of `Shape` in hldm/kernels/cpp/stack.h."""
        config = model.config
        sizes = [batch, config.width, config.heads, self.hidden, config.conv_width, model.window]
        return struct("stack.h", "Shape")(*sizes, len(config.blocks), torch.get_num_threads())


_STACKS: WeakKeyDictionary[Griffin, Stack] = WeakKeyDictionary()


def _refilled(state: GriffinState, tensors: list[Tensor]) -> GriffinState:
    """The state with these tensors in place of its own."""
    left = iter(tensors)
    return tuple(type(part)(*(next(left) for _ in part)) for part in state)


def stack_call(model: Griffin, state: GriffinState, rows: int) -> tuple[Any, GriffinState]:
    """A stack as a kernel takes it, and a copy of its state, which the kernel writes over.

    Raises RuntimeError where weights that the kernels could read have become others that they cannot.
    """
    stack = _STACKS.get(model) or _STACKS.setdefault(model, Stack(model))
    if not stack.find():  # anew at every call: an address that is no longer theirs must not be read
        raise RuntimeError("the model's weights were moved or cast while a text was being written")
    copies = [tensor.clone(memory_format=torch.contiguous_format) for part in state for tensor in part]
    call = struct("stack.h", "Stack")(
        shape=stack.shape(model, rows),
        is_recurrent=stack.is_recurrent,
        weights=ctypes.addressof(stack.pointers),
        rotation=model.rotation(),
        state=copies,
    )
    call.arrays["weights"] = stack.pointers
    return call, _refilled(state, copies)
