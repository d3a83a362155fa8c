"""One position through a whole Griffin stack in a single call of C++: what generation does for every byte.

In torch such a step is some hundred operators on a few numbers each, and nearly all of its time is their overhead. The
kernel reads the parameters where they are and writes a new state of the same layout.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hldm.kernels.library import library
from hldm.model.griffin import (
    AttentionState,
    Griffin,
    GriffinState,
    RecurrentBlock,
    RecurrentState,
    ResidualBlock,
)

Place = tuple[nn.Module, str]  # of a parameter: a module, and its name there


class StackCall(ctypes.Structure):
    """`Stack` of hldm/kernels/cpp/stack.h."""

    _fields_ = [
        ("shape", ctypes.c_int64 * 8),
        *((name, ctypes.c_void_p) for name in ("is_recurrent", "weights", "rotation", "state")),
    ]


def _places(model: Griffin) -> list[Place]:
    """Where the parameters are, in the order that hldm/kernels/cpp/stack.h reads them."""
    blocks = cast("Iterable[ResidualBlock]", model.blocks)
    return [*(place for block in blocks for place in _places_in(block)), (model.norm, "scale")]


def _places_in(block: ResidualBlock) -> list[Place]:
    temporal, mlp = block.temporal, block.mlp
    if isinstance(temporal, RecurrentBlock):
        inside: list[Place] = [
            *(
                (linear, name)
                for linear in (temporal.linear_y, temporal.linear_x)
                for name in ("weight", "bias")
            ),
            *((temporal, name) for name in ("conv_weight", "conv_bias")),
            *((temporal.rg_lru, name) for name in ("gate_weight", "gate_bias", "a_param")),
        ]
    else:
        inside = [(linear, "weight") for linear in (temporal.query, temporal.key, temporal.value)]
    inside += [(temporal.linear_out, "weight"), (temporal.linear_out, "bias")]
    after: list[Place] = [(linear, "weight") for linear in (mlp.gate, mlp.up, mlp.down)]
    return [(block.temporal_norm, "scale"), *inside, (block.mlp_norm, "scale"), *after]


class Stack:
    """Where a stack's parameters are found, and where they were last."""

    def __init__(self, model: Griffin) -> None:
        # the dicts rather than the parameters, which may be replaced by others
        self.places = [(module._parameters, name) for module, name in _places(model)]
        assert len(self.places) == sum(1 for _ in model.parameters())
        kinds = model.config.blocks
        self.kinds = (ctypes.c_uint8 * len(kinds))(*(kind == "recurrent" for kind in kinds))
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
        return (ctypes.c_int64 * 8)(*sizes, len(self.kinds), torch.get_num_threads())


_STACKS: WeakKeyDictionary[Griffin, Stack] = WeakKeyDictionary()


def is_plain(x: Tensor | None) -> bool:
    """Whether the kernels can read a parameter where it is."""
    return x is not None and x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()


def kernels_can_compute() -> bool:
    """Whether there are kernels, and nothing going on around that only torch knows of."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or library() is None:
        return False
    return not torch.is_autocast_enabled("cpu")


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
    else:
        shapes = [(batch, model.window, heads, d // heads)] * 2
        if part.live.dtype != torch.bool or part.live.shape != (batch, model.window):
            return False
    return all(
        tensor.shape == shape and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        for tensor, shape in zip(part, shapes, strict=False)
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
    kernels.hldm_griffin_step(
        stack.shape(model, len(x)),
        stack.kinds,
        stack.pointers,
        ctypes.c_void_p(rotation.data_ptr()),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(doc_start.data_ptr()),
        ctypes.c_void_p(chunk_start.data_ptr()),
        (ctypes.c_void_p * len(before))(*(tensor.data_ptr() for tensor in before)),
        (ctypes.c_void_p * len(after))(*(tensor.data_ptr() for tensor in after)),
        ctypes.c_void_p(y.data_ptr()),
    )
    return y, _refilled(state, after)


def _refilled(state: GriffinState, tensors: list[Tensor]) -> GriffinState:
    """The state with these tensors in place of its own."""
    left = iter(tensors)
    return tuple(type(part)(*(next(left) for _ in part)) for part in state)


def stack_call(
    model: Griffin, state: GriffinState, rows: int, kept: list[Any]
) -> tuple[StackCall, GriffinState]:
    """A stack as a kernel takes it, and a copy of its state, which the kernel writes over.

    kept: is given what the call points to, and must live until the kernel returns
    Raises RuntimeError where weights that the kernels could read have become others that they cannot.
    """
    stack, rotation = _stack(model), model.rotation()
    if not stack.find():  # anew at every call: an address that is no longer theirs must not be read
        raise RuntimeError("the model's weights were moved or cast while a text was being written")
    copies = [tensor.clone(memory_format=torch.contiguous_format) for part in state for tensor in part]
    pointers = (ctypes.c_void_p * len(copies))(*(tensor.data_ptr() for tensor in copies))
    kept += [pointers, rotation, stack]
    call = StackCall(
        shape=stack.shape(model, rows),
        is_recurrent=ctypes.addressof(stack.kinds),
        weights=ctypes.addressof(stack.pointers),
        rotation=rotation.data_ptr(),
        state=ctypes.addressof(pointers),
    )
    return call, _refilled(state, copies)
