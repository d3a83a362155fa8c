"""One position through a whole Griffin stack in a single call of C++: what generation does for every byte.

In torch such a step is some hundred operators on a few numbers each, and nearly all of its time is their overhead. The
kernel reads the parameters where they are and writes a new state of the same layout. `hldm.model.griffin` asks `can_step`.
"""

from __future__ import annotations

import ctypes
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hldm.kernels.library import library

# By kind of block, in the order that hldm/kernels/cpp/step.cpp reads them.
_TEMPORAL = {
    "recurrent": (
        *("linear_y.weight", "linear_y.bias", "linear_x.weight", "linear_x.bias", "conv_weight", "conv_bias"),
        *("rg_lru.gate_weight", "rg_lru.gate_bias", "rg_lru.a_param", "linear_out.weight", "linear_out.bias"),
    ),
    "attention": ("query.weight", "key.weight", "value.weight", "linear_out.weight", "linear_out.bias"),
}
_MLP = ("mlp_norm.scale", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight")


class StackCall(ctypes.Structure):
    """`Stack` of hldm/kernels/cpp/stack.h."""

    _fields_ = [
        ("shape", ctypes.c_int64 * 8),
        *((name, ctypes.c_void_p) for name in ("is_recurrent", "weights", "rotation", "state")),
    ]


class Stack:
    """Where a stack's parameters are found, and where they were last."""

    def __init__(self, model: nn.Module, kinds: tuple[str, ...]) -> None:
        names = []
        for index, kind in enumerate(kinds):
            inside = ("temporal_norm.scale", *(f"temporal.{name}" for name in _TEMPORAL[kind]), *_MLP)
            names += [f"blocks.{index}.{name}" for name in inside]
        places = (name.rpartition(".") for name in (*names, "norm.scale"))
        # the dicts rather than the parameters, which may be replaced by others
        self.places = [(model.get_submodule(module)._parameters, name) for module, _, name in places]
        self.kinds = (ctypes.c_uint8 * len(kinds))(*(kind == "recurrent" for kind in kinds))
        self.hidden = len(model.get_parameter("blocks.0.mlp.gate.weight"))
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

    def shape(self, model: Any, batch: int) -> Any:
        """Sizes in the order of `Shape` in hldm/kernels/cpp/stack.h."""
        config = model.config
        sizes = [batch, config.width, config.heads, self.hidden, config.conv_width, model.window]
        return (ctypes.c_int64 * 8)(*sizes, len(self.kinds), torch.get_num_threads())


_STACKS: WeakKeyDictionary[nn.Module, Stack] = WeakKeyDictionary()


def is_plain(x: Tensor | None) -> bool:
    """Whether the kernels can read a parameter where it is."""
    return x is not None and x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()


def kernels_can_compute() -> bool:
    """Whether there are kernels, and nothing going on around that only torch knows of."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or library() is None:
        return False
    return not torch.is_autocast_enabled("cpu")


def stack_of(model: nn.Module, state: Any, batch: int) -> Stack | None:
    """Where a Griffin's parameters are; None when the kernels cannot read them, do what it does, or read its state."""
    config: Any = model.config
    if (model.training and config.dropout) or batch == 0:
        return None
    stack = _STACKS.get(model)
    if stack is None:
        stack = _STACKS[model] = Stack(model, config.blocks)
    return stack if stack.find() and all(_fits(block, model, batch) for block in state) else None


def found_stack(model: nn.Module) -> Stack:
    """What `stack_of` has just found."""
    return _STACKS[model]


def can_step(model: nn.Module, x: Tensor, state: Any) -> bool:
    """Whether `griffin_step` does what the stack itself would, for x (b t d): one float32 position, no gradients."""
    if x.shape[1] != 1 or type(x) is not Tensor or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return kernels_can_compute() and stack_of(model, state, len(x)) is not None


def _fits(block: Any, model: Any, batch: int) -> bool:
    """Whether a block's state has the shapes and dtypes that the kernel takes for granted."""
    d, heads = model.config.width, model.config.heads
    if len(block) == 2:
        shapes = [(batch, d), (batch, model.config.conv_width - 1, d)]
    else:
        shapes = [(batch, model.window, heads, d // heads)] * 2
        if block[2].dtype != torch.bool or block[2].shape != (batch, model.window):
            return False
    return all(
        part.shape == shape and part.dtype == torch.float32 and part.device.type == "cpu"
        for part, shape in zip(block, shapes, strict=False)
    )


def griffin_step(
    model: nn.Module, x: Tensor, state: Any, doc_start: Tensor, chunk_start: Tensor, rotation: Tensor
) -> tuple[Tensor, Any]:
    """The outputs (b 1 d) and the state after one position; call only where `can_step`.

    state: as `Griffin.initial_state` gives it;  doc_start, chunk_start: (b 1) bool
    rotation: (s+1 1 p) complex64, RoPE of the distances 0 to s = window
    """
    stack, kernels = found_stack(model), library()
    assert kernels is not None and stack.pointers is not None
    before = [part.contiguous() for block in state for part in block]
    after = [torch.empty_like(part) for part in before]
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
        (ctypes.c_void_p * len(before))(*(part.data_ptr() for part in before)),
        (ctypes.c_void_p * len(after))(*(part.data_ptr() for part in after)),
        ctypes.c_void_p(y.data_ptr()),
    )
    parts = iter(after)
    return y, tuple(type(block)(*(next(parts) for _ in block)) for block in state)


def stack_call(model: Any, state: Any, rows: int, kept: list[Any]) -> tuple[StackCall, Any]:
    """A stack as a kernel takes it, and a copy of its state, which the kernel writes over.

    kept: is given what the call points to, and must live until the kernel returns
    """
    stack = found_stack(model)
    parts = [part.clone(memory_format=torch.contiguous_format) for block in state for part in block]
    pointers = (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts))
    rotation = model.rotation()
    kept += [pointers, rotation, stack]
    found = StackCall(
        shape=stack.shape(model, rows),
        is_recurrent=ctypes.addressof(stack.kinds),
        weights=ctypes.addressof(stack.pointers),
        rotation=rotation.data_ptr(),
        state=ctypes.addressof(pointers),
    )
    copies = iter(parts)
    return found, tuple(type(block)(*(next(copies) for _ in block)) for block in state)
