"""`hldm bench --layers`: scan, RG-LRU, attention and a byte's step, each beside what it is measured against.

What is compared is run in turns in one process. Ratios are of the least times: pieces of work this short are either
left in peace or not, and whoever takes longer is disturbed more often. A scan is also held against memory: forward it
must read two numbers and write one, backward read three and write two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hldm.config import GriffinConfig, changed
from hldm.evaluation.tables import Table, cell
from hldm.kernels.library import kernels, library, without_kernels
from hldm.kernels.scan import BACKENDS, can_run, linear_scan_by
from hldm.model.griffin import RGLRU, AttentionBlock, Griffin, Layout

BYTES_FORWARD, BYTES_BOTH = 12, 32  # that a scan must move, of float32, an element
WARM_UP = 2
SCANS = (
    (1, 1024, 128),
    (16, 256, 128),
    (16, 1024, 256),
    (16, 1024, 512),
)  # (b t d); the last two beyond most caches
LAYERS = ((1, 1024, 128), (16, 256, 128))
ATTENTION = ((1, 1024, 128), (16, 256, 128))
STEPS = (1, 8, 64)  # rows of the batch
HEADS, CHUNK = 4, 6  # as configs/small.yaml; positions of a chunk, about those of its text

Times = dict[str, list[float]]  # seconds, by name, a turn each


def in_turns(works: Mapping[str, Callable[[], Any]], repeats: int) -> Times:
    """Seconds of each piece of work, one after another, again and again."""
    seconds: Times = {name: [] for name in works}
    for turn in range(-WARM_UP, repeats):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _figures(times: Times, against: str) -> dict[str, Any]:
    """By name: least and median milliseconds, and how many times faster than `against`."""
    return {
        name: {
            "ms_least": 1e3 * min(seconds),
            "ms_median": 1e3 * statistics.median(seconds),
            "times_faster": min(times[against]) / min(seconds),
        }
        for name, seconds in times.items()
    }


def _in_torch(work: Callable[[], Any]) -> Any:
    with without_kernels():
        return work()


def _both_ways(work: Callable[[], Any], wanted: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward, and backward with the output as its own gradient."""
    y = work()
    return torch.autograd.grad(y, wanted, y.detach())


def time_scan(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Forward, and forward and backward, of every backend but the loop, beside sums of arrays of the same size."""
    a, b = (torch.rand(shape, requires_grad=True) for _ in range(2))
    x, y, z = (torch.rand(shape) for _ in range(3))
    names = [name for name in BACKENDS if name != "loop" and can_run(name, a)]
    scans = {name: partial(lambda backend: linear_scan_by(backend, a, b)[0], name) for name in names}

    def forward(scan: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            scan()

    found = {}
    for way, size in (("forward", BYTES_FORWARD), ("forward and backward", BYTES_BOTH)):
        works: dict[str, Callable[[], Any]] = {"stream": lambda: torch.add(x, y, out=z)}
        for name, scan in scans.items():
            works[name] = (
                partial(forward, scan) if size == BYTES_FORWARD else partial(_both_ways, scan, [a, b])
            )
        times = in_turns(works, repeats)
        found[way] = _figures(times, "chunked")
        moved = {name: x.numel() * (BYTES_FORWARD if name == "stream" else size) for name in works}
        for name, figures in found[way].items():
            figures["gb_per_second"] = moved[name] / min(times[name]) / 1e9
        for figures in found[way].values():
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
    works: dict[str, tuple[Callable[[], Any], list[Tensor]]] = {
        "transformers": (run_theirs, [x, *theirs.parameters()]),
        "hldm": (run_ours, [x, *ours.parameters()]),
    }
    return _with_and_without_kernels(works, repeats)


def _with_and_without_kernels(
    works: Mapping[str, tuple[Callable[[], Any], list[Tensor]]], repeats: int
) -> dict[str, Any]:
    """Figures of "hldm" and of what it is compared with, which comes first; both ways, torch alone and C++."""
    (against, (other, theirs)), (_, (ours, wanted)) = works.items()
    found = {}
    for way in ("forward", "forward and backward"):
        run_other, run_ours = other, ours
        if way != "forward":
            run_other, run_ours = partial(_both_ways, other, theirs), partial(_both_ways, ours, wanted)
        turns: dict[str, Callable[[], Any]] = {against: run_other, "torch": partial(_in_torch, run_ours)}
        if library():
            turns["cpp"] = run_ours
        with torch.set_grad_enabled(way != "forward"):
            found[way] = _figures(in_turns(turns, repeats), against)
    return found


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

    works: dict[str, Callable[[], Any]] = {"dense": dense, "by chunk": lambda: block(x, state, layout)[0]}
    wanted = [x, *block.parameters()]
    both = {name: partial(_both_ways, work, wanted) for name, work in works.items()}
    with torch.no_grad():
        forward = _figures(in_turns(works, repeats), "dense")
    return {"forward": forward, "forward and backward": _figures(in_turns(both, repeats), "dense")}


def time_step(batch: int, repeats: int) -> dict[str, Any]:
    """A byte's step through a stack as configs/small.yaml's encoder, in torch and in C++."""
    config = GriffinConfig(width=128, heads=HEADS)
    model = Griffin(changed(config, blocks=2 * config.blocks), 10).eval()
    x, start = torch.randn(batch, 1, 128), torch.zeros(batch, 1, dtype=torch.bool)
    state = model.initial_state(batch)

    def run() -> Any:
        return model(x, state, start, start)

    turns: dict[str, Callable[[], Any]] = {"torch": partial(_in_torch, run)}
    if library():
        turns["cpp"] = run
    with torch.no_grad():
        return {"forward": _figures(in_turns(turns, 10 * repeats), "torch")}


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
        "byte": {f"batch {batch}": time_step(batch, repeats) for batch in STEPS},
    }


def report(found: Mapping[str, Any]) -> list[str | Table]:
    """What `measure` found: the machine, and a row a measurement."""
    machine = found["machine"]
    rows = [
        [f"{part} {size}, {way}", name, *_cells(figures)]
        for part, sizes in found.items()
        if part != "machine"
        for size, ways in sizes.items()
        for way, names in ways.items()
        for name, figures in names.items()
    ]
    head = ["", "form", "ms, least", "median", "faster", "GB/s", "of stream"]
    told = f"torch {machine['torch']}, {machine['threads']} thread(s); C++ kernels: {machine['kernels']}"
    return [told, Table(head, rows)]


def _cells(figures: Mapping[str, float]) -> list[str]:
    return [
        cell(figures["ms_least"], ".3f"),
        cell(figures["ms_median"], ".3f"),
        f"{figures['times_faster']:.1f}x",
        cell(figures.get("gb_per_second"), ".1f"),
        cell(figures.get("share_of_stream"), ".0%"),
    ]
