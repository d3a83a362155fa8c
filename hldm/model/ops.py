"""What layers are made of, each as its plain formula: recurrence, norm, convolution, gates, rows by index.

Faster forms of those marked so are found by `hldm.model.speed`. Formulas of Griffin (arXiv 2402.19427) with the
numerics of google-deepmind/recurrentgemma.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from hldm.model.speed import has_faster_form

MAX_SQRT_GRADIENT = 1000.0  # recurrentgemma: bounds the gradient of sqrt(1 - a^2) as a nears 1


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is so already."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- recurrence


def linear_scan(a: Tensor, x: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run h_t = a_t h_{t-1} + x_t along time (Griffin, section 2.4), differentiably in a, x and h0.

    a:  (b t d) decay;  x: (b t d) input
    h0: (b d) state carried from the previous stretch of text; zeros when None
    Returns all states (b t d) in x's dtype, and the last one (b d), ready to be carried on. Computes, and returns the
    last state, in float32 (float64 when any argument is): bfloat16 rounds a decay of 0.999 to 1.
    Raises ValueError when the shapes disagree or time is empty.
    """
    h, h_last = scan(*scan_inputs(a, x, h0))
    return h.to(x.dtype), h_last


def scan_inputs(a: Tensor, x: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `linear_scan`, checked, in the dtype that it computes in."""
    if a.ndim != 3 or a.shape != x.shape:
        raise ValueError(f"a and x must share a shape (b t d), got {tuple(a.shape)} and {tuple(x.shape)}")
    b, t, d = a.shape
    if t == 0:
        raise ValueError(f"a scan needs at least one step, got a of shape {tuple(a.shape)}")
    if h0 is not None and h0.shape != (b, d):
        raise ValueError(f"h0 must have shape (b d) = {(b, d)}, got {tuple(h0.shape)}")
    inputs = (a, x) if h0 is None else (a, x, h0)
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in inputs) else torch.float32
    h0 = x.new_zeros(b, d, dtype=dtype) if h0 is None else h0.to(dtype)
    return a.to(dtype), x.to(dtype), h0


@has_faster_form
def scan(a: Tensor, x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence of `linear_scan`, step by step. a, x (b t d), h0 (b d) -> (b t d), (b d)."""
    states, h = [], h0
    for a_t, x_t in zip(a.unbind(1), x.unbind(1), strict=True):
        h = torch.addcmul(x_t, a_t, h)
        states.append(h)
    return torch.stack(states, dim=1), h


@has_faster_form
def rg_lru(
    x: Tensor, weight: Tensor, bias: Tensor, log_radius: Tensor, reset: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor]:
    """The real-gated linear recurrent unit (Griffin, equations 1 to 4).

        r_t = sigmoid(W_r x_t + b_r)                        (1) recurrence gate
        i_t = sigmoid(W_i x_t + b_i)                        (2) input gate
        log a_t = log_radius r_t                            (3) log_radius = -c softplus(Lambda)
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)       (4)

    x:          (b t d)
    weight:     (h w 2w), block-diagonal W_i, then W_r, in h heads of width w;  bias: (2 h w)
    log_radius: (d);  h0: (b d) carried state
    reset:      (b t) minus infinity where a document starts, else 0, added to log a_t: there a_t = 0 forgets the past,
                and the input is not attenuated
    Returns all states (b t d) and the last one (b d).
    """
    logits = einsum(x.unflatten(2, (len(weight), -1)), weight, "b t h w, h w u -> b t h u")
    gates = rearrange(logits, "b t h (two w) -> b t two h w", two=2) + bias
    i, r = gates.sigmoid().flatten(3).unbind(2)  # (b t d) each
    log_a = log_radius * r + reset[..., None]
    # expm1: 1 - exp(2 log a) loses all digits as a nears 1
    multiplier = sqrt_with_bounded_gradient(-torch.expm1(2 * log_a))
    return linear_scan(log_a.exp(), multiplier * (i * x), h0)


def sqrt_with_bounded_gradient(x: Tensor) -> Tensor:
    """sqrt(x) with the gradient min(1 / (2 sqrt(x)), MAX_SQRT_GRADIENT)."""
    root = x.detach().sqrt()
    slope = 0.5 / root.clamp(min=0.5 / MAX_SQRT_GRADIENT)
    return root + slope * (x - x.detach())  # adds 0; only its gradient counts


# ---------------------------------------------------------------- convolution, norm and gate


@has_faster_form
def causal_conv(x: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, inside: Tensor) -> Tensor:
    """y_t = bias + sum_i weight_i x_{t-(k-1)+i} over those of the k taps that lie inside t's document.

    x (b t d), taps (b k-1 d) before it, weight (k d), bias (d), inside (b t k) 1 or 0, 1 at the last
    tap, which is t itself. Returns (b t d).
    """
    windows = torch.cat([taps, x], dim=1).unfold(1, len(weight), 1)  # (b t d k)
    return (windows * inside[:, :, None] * weight.mT).sum(-1) + bias


@has_faster_form
def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) (1 + scale) over the last axis, computed in float32 at least."""
    exact = at_least_float32(x)
    inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (exact * inverse * (1 + scale)).to(x.dtype)


@has_faster_form
def add_rms_norm(x: Tensor, branch: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch, and the norm of it."""
    x = x + branch
    return x, rms_norm(x, scale, eps)


@has_faster_form
def gelu_gate(gate: Tensor, x: Tensor) -> Tensor:
    """gelu(gate) x, gelu in its tanh form, of tensors of one shape."""
    return F.gelu(gate, approximate="tanh") * x


# ---------------------------------------------------------------- rows by index


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (b n d) at index (b t), which is 0 to n - 1. (b t d)."""
    b, n, _ = x.shape
    row = index + n * torch.arange(b, device=x.device)[:, None]
    # whole rows of one table: a seventh of the time of gather, backward included (measured, one core)
    return x.flatten(0, 1).index_select(0, row.flatten()).unflatten(0, index.shape)


def add_rows(y: Tensor, index: Tensor, n: int) -> Tensor:
    """Sums of the y (b t d) that share an index (b t) below n; those of index -1 are left out. (b n d)."""
    b, _, d = y.shape
    # all rows in one table, with a spare row at the end of each document for index -1
    row = index.masked_fill(index < 0, n) + (n + 1) * torch.arange(b, device=y.device)[:, None]
    total = y.new_zeros(b * (n + 1), d).index_add(0, row.flatten(), y.flatten(0, 1))
    return total.view(b, n + 1, d)[:, :n]


def placed_gelu(x: Tensor, index: Tensor, table: Tensor, place: Tensor) -> Tensor:
    """gelu(x_index + table_place), gelu in its exact form.

    x (b n d), index (b t) of 0 to n - 1, table (k d), place (b t) of 0 to k - 1. Returns (b t d).
    """
    return F.gelu(take_rows(x, index) + F.embedding(place, table))


def softmax_nats(logits: Tensor, target: Tensor) -> Tensor:
    """-log softmax(logits)_target. (n v), (n) -> (n)."""
    return F.cross_entropy(logits, target, reduction="none")
