from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hldm.config import GriffinConfig
from hldm.model.griffin import AttentionBlock, Griffin, Layout, RecurrentBlock, RMSNorm
from hldm.model.state import GriffinState

WINDOW = 5
CONFIG = GriffinConfig(width=16, heads=2, blocks=("recurrent", "attention", "recurrent"), mlp_ratio=1.5)


def make_griffin(
    config: GriffinConfig = CONFIG, window: int = WINDOW, dtype: torch.dtype = torch.float64
) -> Griffin:
    """A Griffin with every parameter away from its tame initial value, so that nothing hides behind a zero."""
    torch.manual_seed(0)
    model = Griffin(config, window).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_text(b: int, t: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x, doc_start, chunk_start: documents of about 15 positions, chunks of about 4."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, t, CONFIG.width, generator=generator, dtype=torch.float64)
    doc_start = torch.rand(b, t, generator=generator) < 1 / 15
    return x, doc_start, doc_start | (torch.rand(b, t, generator=generator) < 1 / 4)


def read_in_pieces(model: Griffin, text: tuple[Tensor, ...], cuts: list[int]) -> tuple[Tensor, GriffinState]:
    state, outputs = model.initial_state(text[0].shape[0]), []
    for start, stop in zip([0, *cuts], [*cuts, text[0].shape[1]], strict=True):
        y, state = model(text[0][:, start:stop], state, *(mark[:, start:stop] for mark in text[1:]))
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def test_text_cut_anywhere_equals_one_piece_gradients_included() -> None:
    model, (x, doc_start, chunk_start) = make_griffin(), make_text(3, 41)
    x.requires_grad_()
    wanted = [x, *model.parameters()]

    def measure(cuts: list[int]) -> tuple[Tensor, GriffinState, tuple[Tensor, ...]]:
        y, state = read_in_pieces(model, (x, doc_start, chunk_start), cuts)
        loss = (y * y.cos()).sum() + sum(
            part.sum() for part in tree_leaves(state) if part.is_floating_point()
        )
        return y, state, torch.autograd.grad(loss, wanted)

    whole = measure([])
    for cuts in ([1], [7], [20], [33], [40], [3, 4, 5, 30], list(range(1, 41))):
        torch.testing.assert_close(measure(cuts), whole)


def test_gradients_are_those_of_finite_differences() -> None:
    config = GriffinConfig(width=8, heads=2, blocks=("recurrent", "attention"), mlp_ratio=1.0)
    model, (x, doc_start, chunk_start) = make_griffin(config, window=3), make_text(2, 9, seed=3)
    x = x[..., :8].clone().requires_grad_()
    carried = tree_map(lambda part: part + 0.5 if part.is_floating_point() else ~part, model.initial_state(2))
    leaves = [part.requires_grad_() for part in tree_leaves(carried) if part.is_floating_point()]

    def outputs(*_: Tensor) -> list[Tensor]:
        y, state = model(x, carried, doc_start, chunk_start)
        return [y, *(part for part in tree_leaves(state) if part.is_floating_point())]

    assert torch.autograd.gradcheck(outputs, (x, *leaves, *model.parameters()), fast_mode=True)


def test_packed_documents_equal_separate_documents() -> None:
    model, (x, doc_start, chunk_start) = make_griffin(), make_text(1, 40)
    doc_start[:] = False
    borders = [0, 2, 17, 18, 40]
    doc_start[:, borders[:-1]] = True
    packed, _ = model(x, model.initial_state(1), doc_start, chunk_start | doc_start)
    for start, stop in zip(borders[:-1], borders[1:], strict=True):
        piece = (mark[:, start:stop] for mark in (doc_start, chunk_start | doc_start))
        alone, _ = model(x[:, start:stop], model.initial_state(1), *piece)
        torch.testing.assert_close(packed[:, start:stop], alone)


def test_a_document_start_drops_what_was_carried() -> None:
    model, (x, doc_start, chunk_start) = make_griffin(), make_text(2, 12)
    doc_start[:, 0] = True
    used = tree_map(torch.ones_like, model.initial_state(2))
    for t in (1, 12):
        text = x[:, :t], doc_start[:, :t], chunk_start[:, :t]
        fresh, _ = model(text[0], model.initial_state(2), *text[1:])
        after, _ = model(text[0], used, *text[1:])
        torch.testing.assert_close(after, fresh)


def test_attention_stops_at_the_chunk_but_state_does_not() -> None:
    x, _, chunk_start = make_text(1, 30)
    doc_start = torch.zeros(1, 30, dtype=torch.bool)
    chunk_start[:] = False
    chunk_start[:, [0, 11, 16, 20]] = True
    for kind, reaches in (("attention", False), ("recurrent", True)):
        config = GriffinConfig(width=16, heads=2, blocks=(kind,))
        model, byte = make_griffin(config, window=30), x.clone().requires_grad_()
        y, _ = model(byte, model.initial_state(1), doc_start, chunk_start)
        (gradient,) = torch.autograd.grad(y[0, 18].sum(), byte)
        seen = gradient[0].abs().sum(-1) > 0
        assert seen[16:19].all() and not seen[19:].any()
        assert seen[:16].all() if reaches else not seen[:16].any()


def test_changing_a_position_leaves_earlier_outputs_alone() -> None:
    model, (x, *marks) = make_griffin(), make_text(1, 40)
    before, _ = model(x, model.initial_state(1), *marks)
    for position in (0, 5, 31, 39):
        changed = x.clone()
        changed[:, position] += 1
        after, _ = model(changed, model.initial_state(1), *marks)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=0)
        assert not torch.equal(after[:, position], before[:, position])


def test_padding_on_the_right_changes_nothing() -> None:
    model, (x, *marks) = make_griffin(), make_text(5, 37)
    length = torch.tensor([37, 0, 1, 2, 20])
    _, state = read_in_pieces(model, tuple(part[:, :13] for part in make_text(5, 13, seed=2)), [])
    y, after = model(x, state, *marks, length=length)
    assert y.isfinite().all()
    for row, n in enumerate(length.tolist()):
        expected = tree_map(lambda part, row=row: part[row : row + 1], state)
        if n:
            alone, expected = model(
                x[row : row + 1, :n], expected, *(mark[row : row + 1, :n] for mark in marks)
            )
            torch.testing.assert_close(y[row : row + 1, :n], alone)
        torch.testing.assert_close(tree_map(lambda part, row=row: part[row : row + 1], after), expected)


def test_a_batch_equals_its_rows_and_may_be_empty() -> None:
    model, text = make_griffin(), make_text(4, 33)
    y, state = read_in_pieces(model, text, [])
    for rows in (slice(0, 1), slice(1, 4), slice(2, 2)):
        part, part_state = read_in_pieces(model, tuple(each[rows] for each in text), [])
        torch.testing.assert_close(part, y[rows])
        torch.testing.assert_close(part_state, tree_map(lambda leaf, rows=rows: leaf[rows], state))


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    config = GriffinConfig(width=16, heads=2, blocks=("recurrent", "attention"))
    model, (x, *marks) = make_griffin(config), make_text(2, 20)
    results = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(5)
        y, state = model(x, model.initial_state(2), *marks)
        loss = (y**2).sum() + state[0].hidden.sum() + state[1].keys.sum()
        results.append((y, state, torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize(("window", "t"), [(1, 40), (5, 70), (40, 100), (300, 90)])
def test_blocked_attention_equals_dense_attention_with_positions_from_the_chunk_start(
    window: int, t: int
) -> None:
    heads, d = 2, 16
    torch.manual_seed(0)
    block = AttentionBlock(GriffinConfig(width=d, heads=heads), window, out_variance=1.0).double()
    x = torch.randn(2, t, d, dtype=torch.float64)
    chunk_start = torch.rand(2, t) < (0.2 if window < 40 else 0.03)
    chunk_start[:, 0] = True
    chunk_id, index = chunk_start.cumsum(1), torch.arange(t)
    position = index - torch.where(chunk_start, index, 0).cummax(1).values  # (b t) in the chunk

    def rotate(head: Tensor) -> Tensor:  # (b t h e): pairs of the first half
        pairs = head.shape[-1] // 4
        angle = position[..., None, None] * 1e4 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        even, odd = head[..., 0 : 2 * pairs : 2], head[..., 1 : 2 * pairs : 2]
        turned = torch.stack(
            [even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], dim=-1
        )
        return torch.cat([turned.flatten(-2), head[..., 2 * pairs :]], dim=-1)

    q, k, v = (p(x).unflatten(-1, (heads, -1)) for p in (block.query, block.key, block.value))
    scores = torch.einsum("bqhe,bkhe->bhqk", rotate(q), rotate(k)) / math.sqrt(d / heads)
    distance = index[:, None] - index
    mask = (chunk_id[:, :, None] == chunk_id[:, None]) & (distance >= 0) & (distance <= window)
    attended = torch.einsum("bhqk,bkhe->bqhe", scores.masked_fill(~mask[:, None], -math.inf).softmax(-1), v)
    expected = block.linear_out(attended.flatten(2))

    state = block.initial_state(2, x.device, x.dtype)
    y, _ = block(x, state, Layout.of(torch.zeros_like(chunk_start), chunk_start, None))
    torch.testing.assert_close(y, expected)
    parameters = list(block.parameters())
    weight = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
    )


def test_recurrent_block_agrees_with_recurrentgemma_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = modeling.RecurrentGemmaConfig(
        hidden_size=24,
        lru_width=24,
        num_attention_heads=3,
        conv1d_width=4,
        hidden_activation="gelu_pytorch_tanh",
    )
    torch.manual_seed(0)
    theirs = modeling.RecurrentGemmaRecurrentBlock(config, layer_idx=0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.uniform_(theirs.rg_lru.recurrent_param, -7, 0)  # decays up to 0.999
    ours = RecurrentBlock(GriffinConfig(width=24, heads=3), out_variance=1.0)

    def to_our_layout(part: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by RecurrentGemma's parameter names to tensors by ours."""
        lru = {
            name.removeprefix("rg_lru."): tensor
            for name, tensor in part.items()
            if name.startswith("rg_lru.")
        }
        linear = {name: tensor for name, tensor in part.items() if name.startswith("linear_")}
        return linear | {
            "conv_weight": part["conv_1d.weight"][:, 0].T,  # (d 1 k) to (k d)
            "conv_bias": part["conv_1d.bias"],
            "rg_lru.gate_weight": torch.cat([lru["input_gate_weight"], lru["recurrent_gate_weight"]], dim=2),
            "rg_lru.gate_bias": torch.stack([lru["input_gate_bias"], lru["recurrent_gate_bias"]]),
            "rg_lru.a_param": lru["recurrent_param"],
        }

    ours.load_state_dict(to_our_layout(theirs.state_dict()))
    x, weight = torch.randn(2, 2, 70, 24)
    results = []
    for block in (ours, theirs):
        x_in = x.clone().requires_grad_()
        if block is ours:
            doc_start = torch.zeros(2, 70, dtype=torch.bool)
            doc_start[:, 0] = True  # position 0 is what resets RecurrentGemma's unit
            layout = Layout.of(doc_start, doc_start, None)
            y, _ = block(x_in, block.initial_state(2, x.device, x.dtype), layout)
        else:
            y, _ = block(x_in, torch.arange(70).expand(2, -1), None, use_cache=False)
        (y * weight).sum().backward()
        gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
        gradients = gradients if block is ours else to_our_layout(gradients)
        results.append({"outputs": y, "inputs": x_in.grad, **gradients})
    for name, expected in results[1].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(results[0][name], expected, rtol=1e-5, atol=1e-5 * scale)


def test_decay_starts_on_the_ring_and_weights_at_their_variances() -> None:
    torch.manual_seed(0)
    block = RecurrentBlock(GriffinConfig(width=256, heads=4), out_variance=0.5)
    radius = torch.exp(-torch.nn.functional.softplus(block.rg_lru.a_param))
    assert 0.9 <= radius.min() < 0.91 and 0.998 < radius.max() <= 0.9991
    for weight, variance in (
        (block.rg_lru.gate_weight, 1 / 64),
        (block.conv_weight, 0.01 / 4),
        (block.linear_x.weight, 1 / 256),
        (block.linear_out.weight, 0.5 / 256),
    ):
        assert weight.var().item() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("log_radius", [1e-4, 1e-7, 1e-9, 0.0])
def test_a_decay_near_one_keeps_its_digits_and_a_bounded_gradient(log_radius: float) -> None:
    x, _, _ = make_text(1, 50)
    block = RecurrentBlock(GriffinConfig(width=16, heads=2), out_variance=1.0)
    with torch.no_grad():  # softplus(a_param) = log_radius / 8, gates half open
        block.rg_lru.a_param.fill_(math.log(math.expm1(log_radius / 8)) if log_radius else -200.0)
        block.rg_lru.gate_weight.zero_()
    doc_start = torch.zeros(1, 50, dtype=torch.bool)
    layout = Layout.of(doc_start, doc_start, None)
    results = []
    for dtype in (torch.float32, torch.float64):
        unit, u = block.rg_lru.to(dtype), x.to(dtype).requires_grad_()
        h, last = unit(u, torch.ones(1, 16, dtype=dtype), layout.reset)
        results.append(
            (
                h.double(),
                last.double(),
                *(g.double() for g in torch.autograd.grad(h.sum(), [u, unit.gate_bias])),
            )
        )
    assert all(part.isfinite().all() for part in results[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_low_precision_keeps_the_recurrence_in_float32() -> None:
    config = GriffinConfig(width=32, heads=2)
    torch.manual_seed(0)
    model = Griffin(config, WINDOW)
    x, doc_start, chunk_start = make_text(2, 64)
    x = torch.cat([x, x.flip(1)], dim=-1).float()
    exact, exact_state = model(x, model.initial_state(2), doc_start, chunk_start)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = model(x, model.initial_state(2), doc_start, chunk_start)
    y.float().sum().backward()
    assert state[0].hidden.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)
    torch.testing.assert_close(state[0].hidden, exact_state[0].hidden, rtol=0.1, atol=0.1)
    low = model.bfloat16()
    y, state = low(x.bfloat16(), low.initial_state(2), doc_start, chunk_start)
    assert y.dtype == torch.bfloat16 and state[0].hidden.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.2, atol=0.2)


def test_what_generation_leaves_behind_serves_training() -> None:
    model, (x, *marks) = make_griffin(window=17), make_text(1, 20)
    with torch.inference_mode():
        inferred, _ = model(x, model.initial_state(1), *marks)
    y, _ = model(x, model.initial_state(1), *marks)
    y.sum().backward()
    torch.testing.assert_close(y, inferred.clone())


def test_norm_is_invariant_to_scale_and_has_unit_size() -> None:
    x, norm = 7 * torch.randn(3, 4, 64), RMSNorm(64)
    torch.testing.assert_close(norm(x), norm(100 * x))
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3, 4))


def test_a_wrong_call_says_what_is_wrong() -> None:
    model, (x, doc_start, chunk_start) = make_griffin(), make_text(2, 6)
    state = model.initial_state(2)
    for arguments, message in (
        ((x[..., :8], state, doc_start, chunk_start), "d = 16"),
        ((x[:, :0], state, doc_start[:, :0], chunk_start[:, :0]), "t at least 1"),
        ((x, state, doc_start[:, :5], chunk_start), "doc_start must be bool"),
        ((x, state, doc_start, chunk_start.long()), "chunk_start must be bool"),
        ((x, state[:2], doc_start, chunk_start), "2 rows for each of 3 blocks"),
        ((x, model.initial_state(3), doc_start, chunk_start), r"got \[3, 3, 3\]"),
        ((x, state, doc_start, chunk_start, torch.tensor([6])), "length must be"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
