"""`hldm bench --layers`: scan, RG-LRU and attention, each beside what it is measured against.

What is compared is run in turns in one process. Ratios are of the least times: pieces of work this short are either
left in peace or not, and whoever takes longer is disturbed more often. A scan is also held against memory: forward it
must read two numbers and write one, backward read three and write two.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hldm.config import GriffinConfig
from hldm.evaluation.tables import Table, cell
from hldm.kernels.library import kernels, library, without_kernels
from hldm.model.griffin import RGLRU, AttentionBlock, Layout
from hldm.model.ops import linear_scan
from hldm.runs.clock import in_turns

BYTES_FORWARD, BYTES_BOTH = 12, 32  # that a scan must move, of float32, an element
WARM_UP = 2
# (b t d); the last two beyond most caches
SCANS = ((1, 1024, 128), (16, 256, 128), (16, 1024, 256), (16, 1024, 512))
LAYERS = ((1, 1024, 128), (16, 256, 128))
ATTENTION = ((1, 1024, 128), (16, 256, 128))
WAYS = ("forward", "forward and backward")
COLUMNS: Mapping[str, tuple[str, str]] = {  # of the table: key and format
    "ms, least": ("ms_least", ".3f"),
    "median": ("ms_median", ".3f"),
    "faster": ("times_faster", ".1f"),
    "GB/s": ("gb_per_second", ".1f"),
    "of stream": ("share_of_stream", ".0%"),
}
HEADS, CHUNK = 4, 6  # as configs/small.yaml; positions of a chunk, about those of its text

# by name: what computes, and the tensors that backward finds gradients of
Works = Mapping[str, tuple[Callable[[], Tensor], Sequence[Tensor]]]


def _figures(works: Works, against: str, repeats: int) -> dict[str, Any]:
    """Forward, then forward and backward: least and median milliseconds of each, how many times faster than `against`.

    A piece of work without tensors to find gradients of is the same both ways.
    """
    found = {}
    for way in WAYS:
        turns = {name: partial(_run, *work, way != "forward") for name, work in works.items()}
        with torch.set_grad_enabled(way != "forward"):
            times = {name: [s for _, s in turn] for name, turn in in_turns(turns, repeats, WARM_UP).items()}
        found[way] = {
            name: {
                "ms_least": 1e3 * min(seconds),
                "ms_median": 1e3 * statistics.median(seconds),
                "times_faster": min(times[against]) / min(seconds),
            }
            for name, seconds in times.items()
        }
    return found


def _run(work: Callable[[], Tensor], wanted: Sequence[Tensor], both_ways: bool) -> None:
    """Forward, and backward with the output as its own gradient."""
    y = work()
    if both_ways and wanted:
        torch.autograd.grad(y, wanted, y.detach())


def _with_and_without_kernels(work: Callable[[], Tensor], wanted: Sequence[Tensor]) -> Works:
    """The same in torch alone and, where they are there, with C++ kernels."""
    turns: Works = {"torch": (without_kernels()(work), wanted)}
    return {**turns, "cpp": (work, wanted)} if library() else turns


def time_scan(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Forward, and forward and backward, beside sums of arrays of the same size."""
    a, b = (torch.rand(shape, requires_grad=True) for _ in range(2))
    x, y, z = (torch.rand(shape) for _ in range(3))
    works: Works = {
        "stream": (lambda: torch.add(x, y, out=z), ()),
        "scan": (lambda: linear_scan(a, b)[0], [a, b]),
    }
    found = _figures(works, "stream", repeats)
    for way, size in zip(WAYS, (BYTES_FORWARD, BYTES_BOTH), strict=True):
        for name, figures in found[way].items():
            moved = x.numel() * (BYTES_FORWARD if name == "stream" else size)
            figures["gb_per_second"] = moved / figures["ms_least"] / 1e6
            figures["share_of_stream"] = figures["gb_per_second"] / found[way]["stream"]["gb_per_second"]
    return found


def time_layer(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """The RG-LRU against RecurrentGemma's in transformers, with the same weights.

    Theirs writes each step into a slice, whose backward pass touches all steps: quadratic in time.
    """
    from transformers.models.recurrent_gemma import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    b, t, d = shape
    theirs = RecurrentGemmaRglru(RecurrentGemmaConfig(hidden_size=d, lru_width=d, num_attention_heads=HEADS))
    ours = RGLRU(d, HEADS)
    with torch.no_grad():
        gates = ours.gate_weight.chunk(2, dim=2)
        theirs.input_gate_weight.copy_(gates[0])
        theirs.recurrent_gate_weight.copy_(gates[1])
        theirs.input_gate_bias.zero_()
        theirs.recurrent_gate_bias.zero_()
        theirs.recurrent_param.copy_(ours.a_param)
    x = torch.randn(shape, requires_grad=True)
    reset, hidden, position = torch.zeros(b, t), torch.zeros(b, d), torch.arange(t).expand(b, -1)
    reset[:, 0] = -torch.inf

    def run_theirs() -> Tensor:
        theirs.recurrent_states = None  # else it goes on from the last call
        return theirs(x, position)

    def run_ours() -> Tensor:
        return ours(x, hidden, reset)[0]

    torch.testing.assert_close(run_ours(), run_theirs(), rtol=1e-4, atol=1e-5)
    works = _with_and_without_kernels(run_ours, [x, *ours.parameters()])
    return _figures(
        {"transformers": (run_theirs, [x, *theirs.parameters()]), **works}, "transformers", repeats
    )


def time_attention(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Attention within chunks against the same under a mask over all pairs of positions."""
    b, t, d = shape
    block = AttentionBlock(GriffinConfig(width=d, heads=HEADS), 2 * CHUNK, out_variance=1.0)
    starts = (torch.arange(t) % CHUNK == 0).expand(b, -1)
    layout = Layout.of(torch.zeros_like(starts), starts, None, 4)
    x = torch.randn(shape, requires_grad=True)
    state = block.initial_state(b, x.device, x.dtype)
    same = layout.chunk_id[:, :, None] == layout.chunk_id[:, None]
    mask = (same & torch.ones(t, t, dtype=torch.bool).tril())[:, None]

    def dense() -> Tensor:
        linears = (block.query, block.key, block.value)
        q, k, v = (linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in linears)
        # without RoPE, which is to its advantage
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return block.linear_out(y.transpose(1, 2).flatten(2))

    wanted = [x, *block.parameters()]
    works = {"dense": (dense, wanted), "by chunk": (lambda: block(x, state, layout)[0], wanted)}
    return _figures(works, "dense", repeats)


def measure(*, repeats: int = 10) -> dict[str, Any]:
    """All of it as plain numbers, by part, size, direction and name; `report` makes a table of it."""
    torch.manual_seed(0)
    return {
        "machine": {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kernels": kernels().told,
        },
        "scan": {str(shape): time_scan(shape, repeats) for shape in SCANS},
        "RG-LRU": {str(shape): time_layer(shape, repeats) for shape in LAYERS},
        "attention": {str(shape): time_attention(shape, repeats) for shape in ATTENTION},
    }


def report(found: Mapping[str, Any]) -> list[str | Table]:
    """What `measure` found: the machine, and a row a measurement."""
    machine = found["machine"]
    told = f"torch {machine['torch']}, {machine['threads']} thread(s); C++ kernels: {machine['kernels']}"
    rows = [
        [f"{part} {size}, {way}", form, *(cell(figures.get(key), spec) for key, spec in COLUMNS.values())]
        for part, sizes in found.items()
        if part != "machine"
        for size, ways in sizes.items()
        for way, forms in ways.items()
        for form, figures in forms.items()
    ]
    return [told, Table(["", "form", *COLUMNS], rows)]
