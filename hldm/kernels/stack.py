"""A Griffin stack as the kernels take it: its parameters where they are, and a state that they write over.

One position through a stack is one function in C++ (hldm/kernels/cpp/stack.h). In torch such a step is some hundred
operators on a few numbers each, and nearly all of its time is their overhead.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hldm.kernels.structs import is_plain, pointers_to, struct
from hldm.model.griffin import CONV_WIDTH, Griffin, ResidualBlock
from hldm.model.state import GriffinState, map_carry


class Stack:
    """Where a stack's parameters are found, and where they were last."""

    def __init__(self, model: Griffin) -> None:
        # in the order that hldm/kernels/cpp/stack.h reads them, which is that of the modules; their dicts rather than
        # the parameters, which may be replaced by others
        modules = [module._parameters for module in model.modules()]
        self.places = [(module, name) for module in modules for name, p in module.items() if p is not None]
        self.addresses: list[int] = []
        self.pointers: Any = None
        config = model.config
        self.sizes = dict(
            d=config.width,
            heads=config.heads,
            hidden=cast("ResidualBlock", model.blocks[0]).mlp.gate.out_features,
            taps=CONV_WIDTH,
            window=model.window,
            blocks=len(config.blocks),
            is_recurrent=torch.tensor([kind == "recurrent" for kind in config.blocks]),
        )

    def find(self) -> Any:
        """Pointers to where the parameters are now.

        Raises RuntimeError where weights that the kernels could read have become others that they cannot.
        """
        parameters = [place[name] for place, name in self.places]
        addresses = [0 if p is None else p.data_ptr() for p in parameters]
        if addresses != self.addresses:
            if not all(is_plain(p) for p in parameters):
                raise RuntimeError("the model's weights were moved or cast while a text was being written")
            self.pointers, self.addresses = pointers_to(parameters), addresses
        return self.pointers


_STACKS: WeakKeyDictionary[Griffin, Stack] = WeakKeyDictionary()


def stack_call(model: Griffin, state: GriffinState, packed: list[Tensor] | None = None) -> Any:
    """A stack as a kernel takes it, which writes over its state.

    packed: its weights (`hldm.kernels.panels.packed_stack`); None: where they are
    """
    stack = _STACKS.get(model) or _STACKS.setdefault(model, Stack(model))
    return struct("stack.h", "Stack")(
        weights=stack.find() if packed is None else packed,
        rotation=model.rotation(),
        state=[tensor for part in state for tensor in part],
        **stack.sizes,
    )


def copy_of(state: GriffinState) -> GriffinState:
    """A state that may be written over."""
    copied: GriffinState = map_carry(lambda x: x.clone(memory_format=torch.contiguous_format), state)
    return copied
