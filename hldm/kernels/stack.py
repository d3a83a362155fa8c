"""One position through a whole Griffin stack in a single call of C++: what generation does for every byte.

In torch such a step is some hundred operators on a few numbers each, and nearly all of its time is their overhead. The
kernel reads the parameters where they are and writes a new state of the same layout.
"""

from __future__ import annotations

import ctypes
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hldm.kernels.library import library
from hldm.kernels.structs import is_plain, kernels_can_compute, pointers_to, struct
from hldm.model.griffin import Griffin, ResidualBlock
from hldm.model.state import AttentionState, GriffinState, RecurrentState


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
            self.pointers = None
            if all(is_plain(p) for p in parameters):
                self.pointers = (ctypes.c_void_p * len(addresses))(*addresses)
            self.addresses = addresses
        return self.pointers is not None

    def shape(self, model: Griffin, batch: int) -> Any:
        """Sizes in the order of `Shape` in hldm/kernels/cpp/stack.h."""
        config = model.config
        sizes = [batch, config.width, config.heads, self.hidden, config.conv_width, model.window]
        return struct("stack.h", "Shape")(*sizes, len(config.blocks), torch.get_num_threads())


_STACKS: WeakKeyDictionary[Griffin, Stack] = WeakKeyDictionary()


def _stack(model: Griffin) -> Stack:
    stack = _STACKS.get(model)
    if stack is None:
        stack = _STACKS[model] = Stack(model)
    return stack


def stack_of(model: Griffin, state: GriffinState, batch: int) -> Stack | None:
    """Where a Griffin's parameters are; None when the kernels cannot read them, do what it does, or read its state."""
    if (model.training and model.config.dropout) or batch == 0:
        return None
    stack = _stack(model)
    return stack if stack.find() and all(_fits(block, model, batch) for block in state) else None


def can_step(model: Griffin, x: Tensor, state: GriffinState) -> bool:
    """Whether `run_blocks` takes x (b t d): one float32 position on the CPU, no gradients."""
    if x.shape[1] != 1 or type(x) is not Tensor or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return kernels_can_compute() and stack_of(model, state, len(x)) is not None


def _fits(part: RecurrentState | AttentionState, model: Griffin, batch: int) -> bool:
    """Whether a block's state has the shapes and dtypes that the kernel takes for granted."""
    d, heads = model.config.width, model.config.heads
    if isinstance(part, RecurrentState):
        shapes = [(batch, d), (batch, model.config.conv_width - 1, d)]
        dtypes = [torch.float32, torch.float32]
    else:
        shapes = [*[(batch, model.window, heads, d // heads)] * 2, (batch, model.window)]
        dtypes = [torch.float32, torch.float32, torch.bool]
    return all(
        x.shape == shape and x.dtype == dtype and x.device.type == "cpu"
        for x, shape, dtype in zip(part, shapes, dtypes, strict=True)
    )


def run_blocks(
    model: Griffin,
    x: Tensor,
    state: GriffinState,
    doc_start: Tensor,
    chunk_start: Tensor,
    length: Tensor | None,
) -> tuple[Tensor, GriffinState]:
    """`Griffin.run_blocks` of one position: x (b 1 d), doc_start and chunk_start (b 1) bool."""
    if length is not None or not can_step(model, x, state):
        return NotImplemented
    stack, kernels, rotation = _stack(model), library(), model.rotation()
    assert kernels is not None and stack.pointers is not None
    before = [tensor.contiguous() for part in state for tensor in part]
    after = [torch.empty_like(tensor) for tensor in before]
    x, doc_start, chunk_start = x.contiguous(), doc_start.contiguous(), chunk_start.contiguous()
    y = torch.empty_like(x)
    read = (ctypes.c_void_p(part.data_ptr()) for part in (rotation, x, doc_start, chunk_start))
    kernels.hldm_griffin_step(
        ctypes.byref(stack.shape(model, len(x))),
        ctypes.c_void_p(stack.is_recurrent.data_ptr()),
        stack.pointers,
        *read,
        pointers_to(before),
        pointers_to(after),
        ctypes.c_void_p(y.data_ptr()),
    )
    return y, _refilled(state, after)


def _refilled(state: GriffinState, tensors: list[Tensor]) -> GriffinState:
    """The state with these tensors in place of its own."""
    left = iter(tensors)
    return tuple(type(part)(*(next(left) for _ in part)) for part in state)


def stack_call(model: Griffin, state: GriffinState, rows: int) -> tuple[Any, GriffinState]:
    """A stack as a kernel takes it, and a copy of its state, which the kernel writes over.

    Raises RuntimeError where weights that the kernels could read have become others that they cannot.
    """
    stack = _stack(model)
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
