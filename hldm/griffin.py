"""Griffin (arXiv 2402.19427): gated linear recurrences and attention within a chunk, over text of any length.

`Griffin.forward(x, state, ...) -> (y, state)` is the one way in, for a page and for a byte; text cut anywhere, with
the state carried, gives what it gives in one piece. `doc_start` resets recurrence, convolution and attention;
`chunk_start` only cuts attention. The mathematics and the initial weights are those of google-deepmind/recurrentgemma.
Knows nothing of bytes or latents.

The elementwise chains are autograd functions of their own with the derivatives written out: on a CPU they cost as
much as the matrix products when left to autograd. They walk over rows in blocks that stay in a core's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hldm.config import GriffinConfig
from hldm.scan import linear_scan

CACHED_NUMBERS = 65_536  # of one tensor in a block of rows; measured: 1/4 and 4 times as many are slower
C = 8.0  # Griffin, equation 3: a = radius^(c r)
MAX_SQRT_GRADIENT = 1000.0  # recurrentgemma: bounds d sqrt(1 - a^2) as a nears 1


class RecurrentState(NamedTuple):
    """What a recurrent block carries on."""

    hidden: Tensor  # (b d) float32, the recurrence
    taps: Tensor  # (b k-1 d) last inputs of the convolution; zeros before the document's start


class AttentionState(NamedTuple):
    """What an attention block carries on: the last s = window positions."""

    keys: Tensor  # (b s h e), not rotated: positions are relative to the call
    values: Tensor  # (b s h e)
    live: Tensor  # (b s) bool, whether the position belongs to the still open chunk


GriffinState = tuple[RecurrentState | AttentionState, ...]


class Layout(NamedTuple):
    """Where documents, chunks and rows begin and end in one call; the same for every block."""

    doc_start: Tensor  # (b t) bool
    doc_id: Tensor  # (b t) documents begun in this call; 0: the carried one goes on
    chunk_id: Tensor  # (b t) chunks begun in this call; 0: the carried one goes on
    length: Tensor | None  # (b,) valid positions; None: all


# ---------------------------------------------------------------- elementwise chains


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _row_blocks(*tensors: Tensor, dim: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Walk over tensors that share their rows along dim: on a CPU in blocks that stay in cache, else all at once."""
    rows = tensors[0].shape[dim]
    if tensors[0].device.type == "cpu":
        rows = CACHED_NUMBERS * rows // max(tensors[0].numel(), 1)
    return zip(*(x.split(max(rows, 1), dim) for x in tensors), strict=True)


class _RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean x^2 + eps) (1 + scale); x (n d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[0], 1, dtype=_at_least_float32(x[:0]).dtype)
        gain = 1 + scale
        for x_n, y_n, inverse_n in _row_blocks(x, y, inverse):
            x_n = _at_least_float32(x_n)
            torch.linalg.vector_norm(x_n, dim=1, keepdim=True, out=inverse_n)
            inverse_n.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            torch.mul(x_n * inverse_n, gain, out=y_n)
        ctx.save_for_backward(x, inverse, gain)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse, gain = ctx.saved_tensors
        dx, dscale = torch.empty_like(x), torch.zeros_like(gain)
        for x_n, inverse_n, dy_n, dx_n in _row_blocks(x, inverse, dy, dx):
            unit = _at_least_float32(x_n) * inverse_n
            product = dy_n * unit
            dscale += product.sum(0)
            along = (product @ gain.to(product.dtype)).div_(x.shape[1])
            torch.mul(dy_n, gain, out=product).addcmul_(unit, along[:, None], value=-1)
            torch.mul(product, inverse_n, out=dx_n)
        return dx, dscale, None


class _CausalConv(torch.autograd.Function):
    """y_t = bias + sum_i weight_i x_{t-(k-1-i)} over the taps inside t's document.

    x (b t d), taps (b k-1 d) before it, weight (k d), bias (d), inside (b t k) 1 or 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, inside: Tensor) -> Tensor:
        k, t = weight.shape[0], x.shape[1]
        y = torch.empty_like(x)
        for x_n, taps_n, inside_n, y_n in _row_blocks(x, taps, inside, y):
            extended = torch.cat([taps_n, x_n], dim=1)
            torch.addcmul(bias, x_n, weight[-1], out=y_n)
            for i in range(k - 1):
                y_n.addcmul_(extended[:, i : i + t] * inside_n[..., i : i + 1], weight[i])
        ctx.save_for_backward(x, taps, weight, inside)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, taps, weight, inside = ctx.saved_tensors
        k, t = weight.shape[0], x.shape[1]
        dx, dtaps, dweight, dbias = (torch.empty_like(x), torch.empty_like(taps), torch.zeros_like(weight), 0)
        for x_n, taps_n, inside_n, dy_n, dx_n, dtaps_n in _row_blocks(x, taps, inside, dy, dx, dtaps):
            extended = torch.cat([taps_n, x_n], dim=1)
            dextended = torch.zeros_like(extended)
            for i in range(k):
                dy_i = dy_n * inside_n[..., i : i + 1] if i < k - 1 else dy_n
                dextended[:, i : i + t].addcmul_(dy_i, weight[i])
                dweight[i] += (dy_i * extended[:, i : i + t]).sum((0, 1))
            dbias = dbias + dy_n.sum((0, 1))
            dtaps_n.copy_(dextended[:, : k - 1])
            dx_n.copy_(dextended[:, k - 1 :])
        return dx, dtaps, dweight, dbias, None


class _GatedDecay(torch.autograd.Function):
    """The gates of the RG-LRU (Griffin, equations 1 to 4), from its input to the coefficients of its recurrence.

    i, r = sigmoid(block-diagonal(x));  log a = log_radius r;  b = sqrt(1 - a^2) i x
    At a document's start log a is minus infinity: a = 0 forgets the past, and b = i x is not attenuated.
    x (n d), weight (h w 2w), bias (2 h w), log_radius (d), reset (n 1) 0 or minus infinity; float32 or float64.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, log_radius: Tensor, reset: Tensor
    ) -> tuple[Tensor, Tensor]:
        h, w, _ = weight.shape
        gates = x.new_empty(2, *x.shape)
        a, b, multiplier = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        for x_n, reset_n, i_n, r_n, a_n, b_n, multiplier_n in _row_blocks(x, reset, *gates, a, b, multiplier):
            logits = torch.bmm(x_n.unflatten(1, (h, w)).transpose(0, 1), weight).unflatten(2, (2, w))  # (h n 2 w)
            torch.add(logits[:, :, 0].transpose(0, 1), bias[0], out=i_n.unflatten(1, (h, w)))
            torch.add(logits[:, :, 1].transpose(0, 1), bias[1], out=r_n.unflatten(1, (h, w)))
            i_n.sigmoid_()
            log_a = torch.mul(r_n.sigmoid_(), log_radius, out=multiplier_n).add_(reset_n)
            torch.exp(log_a, out=a_n)
            log_a.mul_(2).expm1_().neg_().sqrt_()  # expm1: 1 - exp(2 log a) loses all digits as a nears 1
            torch.mul(x_n, i_n, out=b_n).mul_(multiplier_n)
        ctx.save_for_backward(x, weight, log_radius, gates, a, multiplier)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor, db: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, weight, log_radius, gates, a, multiplier = ctx.saved_tensors
        h, w, _ = weight.shape
        dx, dweight, dbias = torch.empty_like(x), torch.zeros_like(weight), x.new_zeros(2, h, w)
        dlog_radius = torch.zeros_like(log_radius)
        for x_n, i_n, r_n, a_n, multiplier_n, da_n, db_n, dx_n in _row_blocks(
            x, *gates, a, multiplier, da, db, dx
        ):
            di = db_n * x_n
            dlog_a = di * i_n  # d multiplier
            di.mul_(multiplier_n)
            torch.mul(db_n, i_n, out=dx_n).mul_(multiplier_n)
            # a' = a and multiplier' = -a^2 / multiplier, both by log a; the latter as bounded as the square root
            dlog_a.mul_(a_n).div_(multiplier_n.clamp(min=0.5 / MAX_SQRT_GRADIENT))
            torch.sub(da_n, dlog_a, out=dlog_a).mul_(a_n)
            dlog_radius += (dlog_a * r_n).sum(0)
            dr = dlog_a.mul_(log_radius)
            dlogits = x.new_empty(h, x_n.shape[0], 2, w)
            for gate, (d_gate, value) in enumerate(((di, i_n), (dr, r_n))):
                d_logit = torch.ops.aten.sigmoid_backward(d_gate, value)
                dbias[gate] += d_logit.sum(0).unflatten(0, (h, w))
                dlogits[:, :, gate].copy_(d_logit.unflatten(1, (h, w)).transpose(0, 1))
            dlogits = dlogits.flatten(2)
            x_h = x_n.unflatten(1, (h, w)).permute(1, 2, 0)
            dweight.baddbmm_(x_h, dlogits)
            dx_n.unflatten(1, (h, w)).add_(torch.bmm(dlogits, weight.mT).transpose(0, 1))
        return dx, dweight, dbias, dlog_radius, None


# ---------------------------------------------------------------- attention


@lru_cache(maxsize=16)
def _rotation(positions: int, pairs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """RoPE (arXiv 2104.09864) of positions 0, 1, ...: exp(i n 10000^(-p / pairs)) as (n 1 p), complex."""
    frequency = 1e4 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = torch.arange(positions, dtype=torch.float64)[:, None, None] * frequency
    return torch.polar(torch.ones_like(angle), angle).to(dtype.to_complex()).to(device)


def _rotated_half(x: Tensor) -> Tensor:
    """A view of the first half of each head, in pairs: (... e) to (... e/4), complex."""
    return torch.view_as_complex(x[..., : x.shape[-1] // 2].unflatten(-1, (-1, 2)))


def _window(carried: Tensor, new: Tensor, start: int, stop: int) -> Tensor:
    """Positions start - s to stop of new (b t h e), with carried (b s h e) before its first."""
    s = carried.shape[1]
    return new[:, start - s : stop] if start >= s else torch.cat([carried[:, start:], new[:, :stop]], dim=1)


class _ChunkAttention(torch.autograd.Function):
    """Causal attention to the same chunk, at most s positions back, one block of queries after the other.

    q, k, v (b t h e); keys, values (b s h e) carried, s = window; ids (b s+t) the chunk of each position.
    A block of n queries meets n + s keys, so memory is linear in t. Positions count from the first of these
    keys: RoPE sees differences alone, and one small rotation serves every block and every call.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, ids: Tensor, block: int
    ) -> Tensor:
        b, t, h, e = q.shape
        s = keys.shape[1]
        rotation = _rotation(s + block, e // 4, q.device, _at_least_float32(q[:0]).dtype)
        near = torch.ones(block, s + block, dtype=torch.bool, device=q.device).tril(s).triu()
        y, saved = torch.empty_like(q), []

        def by_head(x: Tensor, rotation: Tensor | None = None, scale: float = 1.0) -> Tensor:
            """(b n h e) to (bh n e), rotated and scaled."""
            wide = x if rotation is None else _at_least_float32(x)
            out = wide.new_empty(b, h, x.shape[1], e)
            torch.mul(wide, scale, out=out.transpose(1, 2))
            if rotation is not None:
                _rotated_half(out).mul_(rotation.transpose(0, 1))
            return out.flatten(0, 1).to(x.dtype)

        for start in range(0, t, block):
            stop = min(start + block, t)
            n = stop - start
            q_n = by_head(q[:, start:stop], rotation[s : s + n], scale=e**-0.5)
            k_n = by_head(_window(keys, k, start, stop), rotation[: s + n])
            v_n = by_head(_window(values, v, start, stop))
            seen = (ids[:, s + start : s + stop, None] == ids[:, None, start : s + stop]) & near[:n, : s + n]
            bias = q.new_zeros(seen.shape).masked_fill_(~seen, -math.inf)  # every query sees itself
            scores = bias[:, None].repeat(1, h, 1, 1).flatten(0, 1).baddbmm_(q_n, k_n.mT)  # (bh n s+n)
            weight = scores.softmax(-1, dtype=_at_least_float32(scores[:0]).dtype).to(q.dtype)
            y[:, start:stop] = torch.bmm(weight, v_n).unflatten(0, (b, h)).transpose(1, 2)
            saved += [q_n, k_n, v_n, weight]
        ctx.save_for_backward(rotation, *saved)
        ctx.sizes = b, t, s, h, e, block
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        b, t, s, h, e, block = ctx.sizes
        back, *saved = ctx.saved_tensors
        back = back.conj()
        dq = dy.new_empty(b, t, h, e)
        dk, dv = dy.new_zeros(2, b, t, h, e)
        dkeys, dvalues = dy.new_zeros(2, b, s, h, e)

        def by_position(x: Tensor, rotation: Tensor | None = None, scale: float = 1.0) -> Tensor:
            """(bh n e) to (b n h e), rotated back and scaled."""
            x = x.unflatten(0, (b, h)).transpose(1, 2)
            if rotation is not None:
                x = _at_least_float32(x).mul_(scale)
                _rotated_half(x).mul_(rotation)
            return x

        for start in range(0, t, block):
            q_n, k_n, v_n, weight = saved[:4]
            del saved[:4]
            stop = min(start + block, t)
            n = stop - start
            dy_n = dy[:, start:stop].transpose(1, 2).flatten(0, 1)
            dweight = torch.bmm(dy_n, v_n.mT)
            dscores = torch.ops.aten._softmax_backward_data(dweight, weight, -1, weight.dtype)
            dq[:, start:stop] = by_position(torch.bmm(dscores, k_n), back[s : s + n], scale=e**-0.5)
            dk_n = by_position(torch.bmm(dscores.mT, q_n), back[: s + n])
            dv_n = by_position(torch.bmm(weight.mT, dy_n))
            old = max(s - start, 0)  # how many of the block's keys were carried
            for d_carried, d_new, d_n in ((dkeys, dk, dk_n), (dvalues, dv, dv_n)):
                d_carried[:, s - old :] += d_n[:, :old]
                d_new[:, max(start - s, 0) : stop] += d_n[:, old:]
        return dq, dk, dv, dkeys, dvalues, None, None


# ---------------------------------------------------------------- modules


def _carry(carried: Tensor, new: Tensor, length: Tensor | None) -> Tensor:
    """The last s positions up to each row's end, over carried (b s ...) followed by new (b t ...)."""
    b, s = carried.shape[:2]
    t = new.shape[1]
    if length is None:
        return new[:, t - s :].clone() if t >= s else torch.cat([carried[:, t:], new], dim=1)
    rows = torch.arange(b, device=new.device)[:, None]
    index = length[:, None] + torch.arange(-s, 0, device=new.device)  # (b s) in new; negative: still in carried
    from_new, from_carried = new[rows, index.clamp(min=0)], carried[rows, (index + s).clamp(max=s - 1)]
    return torch.where((index < 0).unflatten(1, (s, *[1] * (new.ndim - 2))), from_carried, from_new)


def _normal(*shape: int, variance: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * math.sqrt(variance))


def _linear(inputs: int, outputs: int, *, variance: float, bias: bool) -> nn.Linear:
    """A linear layer with weights N(0, variance / inputs) and no bias at first."""
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
        return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), self.scale, self.eps).view(x.shape)


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)). Two products of half the width: measured faster than one that is then split."""

    def __init__(self, width: int, hidden: int, *, out_variance: float) -> None:
        super().__init__()
        self.gate = _linear(width, hidden, variance=1.0, bias=False)
        self.up = _linear(width, hidden, variance=1.0, bias=False)
        self.down = _linear(hidden, width, variance=out_variance, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit (Griffin, section 2.4)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        w = width // heads
        self.gate_weight = _normal(heads, w, 2 * w, variance=1 / w)  # input gate, then recurrence gate
        self.gate_bias = nn.Parameter(torch.zeros(2, heads, w))
        # radius = exp(-softplus(a_param)), radius^2 uniform on the ring between 0.9^2 and 0.999^2
        radius = torch.empty(width).uniform_(0.9**2, 0.999**2).sqrt()
        self.a_param = nn.Parameter(torch.log(torch.expm1(-torch.log(radius))))

    def forward(self, x: Tensor, hidden: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """x (b t d), hidden (b d) -> states (b t d) in x's dtype, last state (b d)."""
        # float32, whatever the rest runs in: bfloat16 rounds a decay of 0.999 to 1, and then nothing is forgotten
        with torch.autocast(x.device.type, enabled=False):
            u = _at_least_float32(x)
            reset = torch.where(layout.doc_start, -math.inf, 0.0).to(u.dtype)
            a, b = _GatedDecay.apply(
                u.flatten(0, 1),
                self.gate_weight.to(u.dtype),
                self.gate_bias.to(u.dtype),
                -C * F.softplus(self.a_param.to(u.dtype)),
                reset.view(-1, 1),
            )
            h, h_last = linear_scan(a.view(u.shape), b.view(u.shape), hidden)
        return h.to(x.dtype), h_last if layout.length is None else _carry(hidden[:, None], h, layout.length)[:, 0]


class RecurrentBlock(nn.Module):
    """out(gelu(y(x)) * rg_lru(conv(x(x)))) (Griffin, section 2.3)."""

    def __init__(self, config: GriffinConfig, *, out_variance: float) -> None:
        super().__init__()
        d, k = config.width, config.conv_width
        self.linear_y = _linear(d, d, variance=1.0, bias=True)
        self.linear_x = _linear(d, d, variance=1.0, bias=True)
        self.conv_weight = _normal(k, d, variance=0.01 / k)  # the last row meets the current position
        self.conv_bias = nn.Parameter(torch.zeros(d))
        self.rg_lru = RGLRU(d, config.heads)
        self.linear_out = _linear(d, d, variance=out_variance, bias=True)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        k, d = self.conv_weight.shape
        hidden_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return RecurrentState(
            torch.zeros(batch, d, device=device, dtype=hidden_dtype),
            torch.zeros(batch, k - 1, d, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor, state: RecurrentState, layout: Layout) -> tuple[Tensor, RecurrentState]:
        k = self.conv_weight.shape[0]
        gate, u = self.linear_y(x), self.linear_x(x)
        taps = state.taps.to(u.dtype)
        doc_id = F.pad(layout.doc_id, (k - 1, 0))  # (b k-1+t); what is carried belongs to document 0
        inside = doc_id.unfold(1, k, 1) == layout.doc_id[..., None]  # (b t k)
        conv = _CausalConv.apply(
            u, taps, self.conv_weight.to(u.dtype), self.conv_bias.to(u.dtype), inside.to(u.dtype)
        )
        h, hidden = self.rg_lru(conv, state.hidden, layout)
        last_inside = _carry(doc_id[:, : k - 1], layout.doc_id, layout.length) == layout.doc_id[:, -1:]
        taps = _carry(taps, u, layout.length) * last_inside[..., None]
        return self.linear_out(F.gelu(gate, approximate="tanh") * h), RecurrentState(hidden, taps)


class AttentionBlock(nn.Module):
    """Multi-head attention to the current chunk, to a position and the `window` before it; RoPE on half of each head."""

    def __init__(self, config: GriffinConfig, window: int, *, out_variance: float) -> None:
        super().__init__()
        self.heads, self.window = config.heads, window
        d = config.width
        self.query = _linear(d, d, variance=1.0, bias=False)
        self.key = _linear(d, d, variance=1.0, bias=False)
        self.value = _linear(d, d, variance=1.0, bias=False)
        self.linear_out = _linear(d, d, variance=out_variance, bias=True)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> AttentionState:
        d = self.query.weight.shape[0]
        keys = torch.zeros(batch, self.window, self.heads, d // self.heads, device=device, dtype=dtype)
        live = torch.zeros(batch, self.window, device=device, dtype=torch.bool)
        return AttentionState(keys, torch.zeros_like(keys), live)

    def forward(self, x: Tensor, state: AttentionState, layout: Layout) -> tuple[Tensor, AttentionState]:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.query, self.key, self.value))  # (b t h e)
        keys, values = state.keys.to(k.dtype), state.values.to(v.dtype)
        carried_id = state.live.to(layout.chunk_id.dtype) - 1  # live: 0, the chunk that goes on; else -1, none
        ids = torch.cat([carried_id, layout.chunk_id], dim=1)
        with torch.autocast(x.device.type, enabled=False):
            y = _ChunkAttention.apply(q, k, v, keys, values, ids, max(self.window, 32))
        live = _carry(carried_id, layout.chunk_id, layout.length) == layout.chunk_id[:, -1:]
        state = AttentionState(_carry(keys, k, layout.length), _carry(values, v, layout.length), live)
        return self.linear_out(y.flatten(2)), state


class ResidualBlock(nn.Module):
    """x + temporal(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, kind: str, config: GriffinConfig, window: int) -> None:
        super().__init__()
        out_variance = 2 / len(config.blocks)  # recurrentgemma: the residual stream starts at one size for any depth
        self.temporal_norm = RMSNorm(config.width)
        if kind == "recurrent":
            self.temporal = RecurrentBlock(config, out_variance=out_variance)
        else:
            self.temporal = AttentionBlock(config, window, out_variance=out_variance)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = GatedMLP(config.width, round(config.width * config.mlp_ratio), out_variance=out_variance)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, Any]:
        y, state = self.temporal(self.temporal_norm(x), state, layout)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), state


class Griffin(nn.Module):
    """A stack of residual blocks, as config.blocks names them, and a last norm.

    window: positions before its own that attention sees within a chunk; the longest chunk less one suffices.
    """

    def __init__(self, config: GriffinConfig, window: int) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1 position, got {window}")
        self.config = config
        self.gradient_checkpointing = False  # recompute each block in backward instead of keeping its activations
        self.blocks = nn.ModuleList(ResidualBlock(kind, config, window) for kind in config.blocks)
        self.norm = RMSNorm(config.width)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GriffinState:
        """The state before any text; on the device and in the dtype of the weights unless given."""
        device = torch.device(device) if device is not None else self.norm.scale.device
        dtype = dtype or self.norm.scale.dtype
        return tuple(block.temporal.initial_state(batch, device, dtype) for block in self.blocks)

    def forward(
        self,
        x: Tensor,
        state: GriffinState,
        doc_start: Tensor,
        chunk_start: Tensor,
        length: Tensor | None = None,
    ) -> tuple[Tensor, GriffinState]:
        """Read on from state.

        x: (b t d);  doc_start, chunk_start: (b t) bool, a document's start being a chunk's too
        length: (b,) valid positions where rows are padded on the right; None: all. Outputs there mean nothing.
        Returns outputs (b t d) and the state after the last valid position, unchanged where length is 0.
        Raises ValueError when shapes disagree.
        """
        self._check(x, state, doc_start, chunk_start, length)
        if length is not None:
            valid = torch.arange(x.shape[1], device=x.device) < length[:, None]  # padding starts nothing
            doc_start, chunk_start = doc_start & valid, chunk_start & valid
        layout = Layout(doc_start, doc_start.cumsum(1), (doc_start | chunk_start).cumsum(1), length)
        states = []
        for block, block_state in zip(self.blocks, state, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, block_state = checkpoint(block, x, block_state, layout, use_reentrant=False)
            else:
                x, block_state = block(x, block_state, layout)
            states.append(block_state)
        return self.norm(x), tuple(states)

    def _check(
        self, x: Tensor, state: GriffinState, doc_start: Tensor, chunk_start: Tensor, length: Tensor | None
    ) -> None:
        if x.ndim != 3 or x.shape[2] != self.config.width or x.shape[1] == 0:
            raise ValueError(f"x must have shape (b t d) with t >= 1 and d = {self.config.width}, got {tuple(x.shape)}")
        for name, start in (("doc_start", doc_start), ("chunk_start", chunk_start)):
            if start.shape != x.shape[:2] or start.dtype != torch.bool:
                raise ValueError(
                    f"{name} must be bool of shape (b t) = {tuple(x.shape[:2])}, "
                    f"got {start.dtype} of shape {tuple(start.shape)}"
                )
        if length is not None and length.shape != x.shape[:1]:
            raise ValueError(f"length must have shape (b,) = {tuple(x.shape[:1])}, got {tuple(length.shape)}")
        if len(state) != len(self.blocks):
            raise ValueError(f"state must hold one entry for each of {len(self.blocks)} blocks, got {len(state)}")
        if state[0][0].shape[0] != x.shape[0]:
            raise ValueError(f"state holds {state[0][0].shape[0]} rows and x {x.shape[0]}: they must agree")
