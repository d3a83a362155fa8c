"""Griffin (arXiv 2402.19427): gated linear recurrences, and attention within a chunk, over text of any length.

`Griffin.forward(x, state, ...) -> (y, state)` is the one way in, for a page and for a byte; text cut anywhere,
with the state carried, gives what it gives in one piece. `doc_start` resets recurrence, convolution and attention;
`chunk_start` only cuts attention. Mathematics and initial weights are those of google-deepmind/recurrentgemma.
Knows nothing of bytes or latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hldm.config import StackConfig
from hldm.model.ops import (
    add_rms_norm,
    at_least_float32,
    causal_conv,
    gelu_gate,
    rg_lru,
    rms_norm,
)
from hldm.model.state import AttentionState, GriffinState, RecurrentState

CONV_WIDTH = 4  # taps of the causal convolution (Griffin, section 2.3)
DECAY_POWER = 8.0  # c of Griffin, equation 4: a = radius^(c r)
ATTENTION_BLOCK = 32  # queries that share their keys, at least; measured for windows below it


class Layout(NamedTuple):
    """Where documents, chunks and rows begin and end in one call; the same for every block."""

    reset: Tensor  # (b t) float32, minus infinity where a document starts, else 0
    inside: Tensor  # (b t k) 1 where a tap of the convolution lies in the document of its position, else 0
    taps_inside: Tensor  # (b k-1 1) the same for the taps that will be carried on
    chunk_id: Tensor  # (b t) chunks begun in this call; 0: the carried one goes on
    length: Tensor | None  # (b,) valid positions; None: all

    @classmethod
    def of(cls, doc_start: Tensor, chunk_start: Tensor, length: Tensor | None) -> Layout:
        """From the marks (b t) of starts; a document's start is a chunk's too."""
        if length is not None:  # padding starts nothing
            valid = torch.arange(doc_start.shape[1], device=doc_start.device) < length[:, None]
            doc_start, chunk_start = doc_start & valid, chunk_start & valid
        doc_id = doc_start.cumsum(1)
        extended = F.pad(doc_id, (CONV_WIDTH - 1, 0))  # the carried taps belong to document 0
        taps_id = _carry(extended[:, : CONV_WIDTH - 1], doc_id, length)
        return cls(
            reset=torch.zeros_like(doc_id, dtype=torch.float32).masked_fill_(doc_start, -math.inf),
            inside=(extended.unfold(1, CONV_WIDTH, 1) == doc_id[..., None]).float(),
            taps_inside=(taps_id == doc_id[:, -1:])[..., None],
            chunk_id=(doc_start | chunk_start).cumsum(1),
            length=length,
        )


def _carry(carried: Tensor, new: Tensor, length: Tensor | None) -> Tensor:
    """The last s positions before each row's end, of carried (b s ...) followed by new (b t ...)."""
    b, s = carried.shape[:2]
    t = new.shape[1]
    if length is None:
        return new[:, t - s :].clone() if t >= s else torch.cat([carried[:, t:], new], dim=1)
    rows = torch.arange(b, device=new.device)[:, None]
    index = length[:, None] + torch.arange(-s, 0, device=new.device)  # (b s) in new; below 0: in carried
    is_old = (index < 0).view(b, s, *[1] * (new.ndim - 2))
    return torch.where(is_old, carried[rows, (index + s).clamp(max=s - 1)], new[rows, index.clamp(min=0)])


# ---------------------------------------------------------------- attention


@lru_cache(maxsize=32)
def _rotation(positions: int, pairs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """RoPE (arXiv 2104.09864) of positions 0, 1, ...: exp(i n 10000^(-p / pairs)) as (n 1 p); dtype is complex."""
    with torch.inference_mode(False):  # what is cached while generating must serve training too
        frequency = 1e4 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = torch.arange(positions, dtype=torch.float64)[:, None, None] * frequency
        return torch.polar(torch.ones_like(angle), angle).to(device, dtype)


def _rotate(x: Tensor, first: int) -> Tensor:
    """x (... n h e) with the first half of each head turned, in pairs, for the positions first, first + 1, ..."""
    half = x.shape[-1] // 2
    pairs = torch.view_as_complex(at_least_float32(x[..., :half]).unflatten(-1, (-1, 2)))
    last = first + x.shape[-3]
    # of powers of two: texts of ever other lengths share a few tables
    rotation = _rotation(1 << (last - 1).bit_length(), half // 2, pairs.dtype, x.device)[first:last]
    return torch.cat([torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype), x[..., half:]], dim=-1)


def _attend_in_chunk(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, chunk_id: Tensor, carried_id: Tensor
) -> Tensor:
    """Causal attention of each query to its own position and the s before it, where they share its chunk.

    q, k, v (b t h e), chunk_id (b t); before them, carried: keys, values (b s h e), carried_id (b s).
    Blocks of w >= s queries meet s + w keys each: time and memory are linear in t. RoPE only sees differences,
    so positions count from the first carried key, the same in every call. Returns (b t he).
    """
    b, t, h, e = q.shape
    s = keys.shape[1]
    q, k, keys = _rotate(q, s), _rotate(k, s), _rotate(keys, 0)
    w = min(t, max(s, ATTENTION_BLOCK))
    n = -(-t // w)
    if n * w > t:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, n * w - t)) for x in (q, k, v))
        chunk_id = F.pad(chunk_id, (0, n * w - t), value=-2)  # -2: of no chunk, seen by their own kind alone

    def meet(carried: Tensor, new: Tensor) -> Tensor:
        """(b s ...), (b nw ...) to (bn s+w ...): each block with the s positions before it."""
        own = new.unflatten(1, (n, w))
        before = carried[:, None]
        if n > 1:
            before = torch.cat([before, own[:, :-1, w - s :]], dim=1)
        return torch.cat([before, own], dim=2).flatten(0, 1)

    ids = meet(carried_id, chunk_id)
    near = torch.ones(w, s + w, dtype=torch.bool, device=q.device).tril(s).triu()
    mask = (ids[:, s:, None] == ids[:, None]) & near  # (bn w s+w)
    q, k, v = q.view(b * n, w, h, e), meet(keys, k), meet(values, v)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None]
    )
    return y.transpose(1, 2).reshape(b, n * w, h * e)[:, :t]


# ---------------------------------------------------------------- modules


def _normal(*shape: int, variance: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * math.sqrt(variance))


def _linear(inputs: int, outputs: int, *, variance: float = 1.0, bias: bool = False) -> nn.Linear:
    """A linear layer with weights N(0, variance / inputs) and a bias of 0, if any."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(linear.weight, std=math.sqrt(variance / inputs))
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) (1 + scale) over the last axis, in float32 at least."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, self.eps)

    def of_sum(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + branch, and the norm of it. None: nothing is to be added."""
        return (x, self(x)) if branch is None else add_rms_norm(x, branch, self.scale, self.eps)


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)). Two products rather than one to split: measured faster, and no copies."""

    def __init__(self, width: int, hidden: int, *, out_variance: float) -> None:
        super().__init__()
        self.gate = _linear(width, hidden)
        self.up = _linear(width, hidden)
        self.down = _linear(hidden, width, variance=out_variance)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu_gate(self.gate(x), self.up(x)))


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit (Griffin, section 2.4)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        w = width // heads
        self.gate_weight = _normal(heads, w, 2 * w, variance=1 / w)  # input gate, then recurrence gate
        self.gate_bias = nn.Parameter(torch.zeros(2, heads, w))
        # radius = exp(-softplus(a_param)), its square uniform on the ring between 0.9^2 and 0.999^2
        radius = torch.empty(width).uniform_(0.9**2, 0.999**2).sqrt()
        self.a_param = nn.Parameter(torch.log(torch.expm1(-torch.log(radius))))

    def forward(self, x: Tensor, hidden: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        """x (b t d), hidden (b d), reset (b t) -> states (b t d), the last one (b d); float32 or float64."""
        weight, bias, a_param, reset = (
            part.to(x.dtype) for part in (self.gate_weight, self.gate_bias, self.a_param, reset)
        )
        log_radius = -DECAY_POWER * F.softplus(a_param)
        return rg_lru(x, weight, bias, log_radius, reset, hidden)


class RecurrentBlock(nn.Module):
    """out(gelu(y(x)) * rg_lru(conv(x(x)))) (Griffin, section 2.3)."""

    def __init__(self, config: StackConfig, *, out_variance: float) -> None:
        super().__init__()
        d, k = config.width, CONV_WIDTH
        self.linear_y = _linear(d, d, bias=True)
        self.linear_x = _linear(d, d, bias=True)
        self.conv_weight = _normal(k, d, variance=0.01 / k)  # the last row meets the current position
        self.conv_bias = nn.Parameter(torch.zeros(d))
        self.rg_lru = RGLRU(d, config.heads)
        self.linear_out = _linear(d, d, variance=out_variance, bias=True)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        k, d = self.conv_weight.shape
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        hidden = torch.zeros(batch, d, device=device, dtype=dtype)
        return RecurrentState(hidden, hidden.new_zeros(batch, k - 1, d))

    def forward(self, x: Tensor, state: RecurrentState, layout: Layout) -> tuple[Tensor, RecurrentState]:
        y = self.linear_y(x)
        u = self.linear_x(x)
        # float32 whatever the rest runs in: bfloat16 rounds a decay of 0.999 to 1, and nothing is ever forgotten
        with torch.autocast(x.device.type, enabled=False):
            u = at_least_float32(u)
            weight, bias, inside = (
                part.to(u.dtype) for part in (self.conv_weight, self.conv_bias, layout.inside)
            )
            conv = causal_conv(u, state.taps, weight, bias, inside)
            h, last = self.rg_lru(conv, state.hidden, layout.reset)
        if layout.length is not None:
            last = _carry(state.hidden[:, None], h, layout.length)[:, 0]
        taps = _carry(state.taps, u, layout.length) * layout.taps_inside
        return self.linear_out(gelu_gate(y, h.to(y.dtype))), RecurrentState(last, taps)


class AttentionBlock(nn.Module):
    """Multi-head attention within a chunk, to a position and the `window` before it; RoPE on half of each head."""

    def __init__(self, config: StackConfig, window: int, *, out_variance: float) -> None:
        super().__init__()
        self.heads, self.window = config.heads, window
        self.query = _linear(config.width, config.width)
        self.key = _linear(config.width, config.width)
        self.value = _linear(config.width, config.width)
        self.linear_out = _linear(config.width, config.width, variance=out_variance, bias=True)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> AttentionState:
        width = self.query.in_features // self.heads
        keys = torch.zeros(batch, self.window, self.heads, width, device=device, dtype=dtype)
        live = torch.zeros(batch, self.window, device=device, dtype=torch.bool)
        return AttentionState(keys, torch.zeros_like(keys), live)

    def forward(self, x: Tensor, state: AttentionState, layout: Layout) -> tuple[Tensor, AttentionState]:
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.query, self.key, self.value))
        keys, values = state.keys.to(k.dtype), state.values.to(v.dtype)
        carried_id = state.live.long() - 1  # 0: of the chunk that goes on; -1: of none
        y = _attend_in_chunk(q, k, v, keys, values, layout.chunk_id, carried_id)
        live = _carry(carried_id, layout.chunk_id, layout.length) == layout.chunk_id[:, -1:]
        state = AttentionState(_carry(keys, k, layout.length), _carry(values, v, layout.length), live)
        return self.linear_out(y), state


class ResidualBlock(nn.Module):
    """x + temporal(norm(x)), then x + mlp(norm(x)); the last addition is deferred to the next norm, which fuses it."""

    def __init__(self, kind: str, config: StackConfig, window: int) -> None:
        super().__init__()
        # recurrentgemma: the residual stream keeps its size at any depth
        out_variance = 2 / len(config.blocks)
        self.temporal_norm = RMSNorm(config.width)
        self.temporal: RecurrentBlock | AttentionBlock
        if kind == "recurrent":
            self.temporal = RecurrentBlock(config, out_variance=out_variance)
        else:
            self.temporal = AttentionBlock(config, window, out_variance=out_variance)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = GatedMLP(config.width, config.hidden, out_variance=out_variance)

    def forward(
        self, x: Tensor, branch: Tensor | None, state: Any, layout: Layout
    ) -> tuple[Tensor, Tensor, Any]:
        """From the input x + branch to the output, again in two parts, which the next norm adds up as it reads them."""
        x, normed = self.temporal_norm.of_sum(x, branch)
        y, state = self.temporal(normed, state, layout)
        x, normed = self.mlp_norm.of_sum(x, y)
        return x, self.mlp(normed), state


class Griffin(nn.Module):
    """A stack of residual blocks, as config.blocks names them, and a last norm.

    window: how many positions before its own attention sees, within a chunk; the longest chunk, less one, will do.
    gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: StackConfig, window: int) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1 position, got {window}")
        self.config, self.window = config, window
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(ResidualBlock(kind, config, window) for kind in config.blocks)
        self.norm = RMSNorm(config.width)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GriffinState:
        """The state before any text; on the device and in the dtype of the weights unless given."""
        device = torch.device(device or self.norm.scale.device)
        dtype = dtype or self.norm.scale.dtype
        blocks = cast("Iterable[ResidualBlock]", self.blocks)
        return tuple(block.temporal.initial_state(batch, device, dtype) for block in blocks)

    def rotation(self) -> Tensor:
        """RoPE of the distances 0 to s = window: (s+1 1 p) complex64, p pairs being half of a head."""
        pairs = self.config.width // self.config.heads // 4
        return _rotation(self.window + 1, pairs, torch.complex64, self.norm.scale.device)

    def forward(
        self,
        x: Tensor,
        state: GriffinState,
        doc_start: Tensor,
        chunk_start: Tensor,
        length: Tensor | None = None,
    ) -> tuple[Tensor, GriffinState]:
        """Read on from state.

        x: (b t d);  doc_start, chunk_start: (b t) bool; a document's start is a chunk's too
        length: (b,) valid positions of rows padded on the right, whose outputs mean nothing there; None: all
        Returns outputs (b t d) and the state after the last valid position, unchanged where length is 0.
        Raises ValueError when the shapes disagree.
        """
        self._check(x, state, doc_start, chunk_start, length)
        layout = Layout.of(doc_start, chunk_start, length)
        states, branch = [], None
        for block, carried in zip(self.blocks, state, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, branch, carried = checkpoint(block, x, branch, carried, layout, use_reentrant=False)
            else:
                x, branch, carried = block(x, branch, carried, layout)
            states.append(carried)
        return self.norm.of_sum(x, branch)[1], tuple(states)

    def _check(
        self, x: Tensor, state: GriffinState, doc_start: Tensor, chunk_start: Tensor, length: Tensor | None
    ) -> None:
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != self.config.width:
            raise ValueError(
                f"x must be (b t d), t at least 1 and d = {self.config.width}, got {tuple(x.shape)}"
            )
        b, t, _ = x.shape
        for name, marks in (("doc_start", doc_start), ("chunk_start", chunk_start)):
            if marks.shape != (b, t) or marks.dtype != torch.bool:
                raise ValueError(
                    f"{name} must be bool (b t) = {(b, t)}, got {marks.dtype} {tuple(marks.shape)}"
                )
        if length is not None and length.shape != (b,):
            raise ValueError(f"length must be (b,) = {(b,)}, got {tuple(length.shape)}")
        if len(state) != len(self.blocks) or any(part[0].shape[0] != b for part in state):
            found = [part[0].shape[0] for part in state]
            raise ValueError(f"state must hold {b} rows for each of {len(self.blocks)} blocks, got {found}")
