"""Summaries beyond the mean: what they hold, that nothing looks ahead, and that text cut anywhere is read the same."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from hldm import cli
from hldm.config import HierarchyConfig, PriorConfig
from hldm.model.hierarchy import Entries
from hldm.studies.summaries import KINDS, POOLS, SUBSETS, Summariser

R, Z = 4, 3
HIERARCHY = HierarchyConfig(levels=2, ratio=R, window=2)
EVERY = pytest.mark.parametrize("kind", KINDS)


def summariser(kind: str) -> Summariser:
    """Random weights, all of them: those that start at 0 hide what they multiply."""
    torch.manual_seed(0)
    made = Summariser(PriorConfig(width=16, heads=2, layers=2, reads_text=False), HIERARCHY, Z, kind).double()
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made.eval()


def state_of(made: Summariser, rows: int):
    state = made.initial_state(rows)
    context = type(state.context)(
        *(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in state.context)
    )
    return state._replace(context=context, recent=state.recent.double())


def some_text(n: int = 90):
    latents = torch.randn(2, n, Z, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    opens = torch.zeros(2, n, dtype=torch.bool)
    opens[:, 0] = opens[1, [20, 47]] = True
    return latents, torch.ones(2, n, dtype=torch.bool), opens


@EVERY
@torch.no_grad()
def test_text_in_pieces_is_read_as_in_one(kind):
    made = summariser(kind)
    latents, mask, opens = some_text()
    whole, _ = made(latents, mask, opens, state_of(made, 2))
    state, at, pieces = state_of(made, 2), 0, []
    for size in itertools.cycle([1, 1, 3, 7, 2, 30]):
        part = slice(at, min(at + size, 90))
        context, state = made(latents[:, part], mask[:, part], opens[:, part], state)
        pieces.append(context.summary[:, :-1])
        at = part.stop
        if at == 90:
            break
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole.summary[:, :-1])


@EVERY
@torch.no_grad()
def test_nothing_looks_ahead_and_a_block_far_back_is_heard_of(kind):
    made = summariser(kind)
    latents, mask, opens = some_text()
    before, _ = made(latents, mask, opens, state_of(made, 2))
    latents[0, 40] += 1
    after, _ = made(latents, mask, opens, state_of(made, 2))
    assert torch.equal(before.summary[0, :41], after.summary[0, :41])
    assert torch.equal(before.summary[1], after.summary[1])
    assert not torch.allclose(before.summary[0, 60], after.summary[0, 60])


def extra_of(kind: str, block: torch.Tensor, level: int) -> torch.Tensor:
    """What is beside the mean of one block (k z) that opens its document."""
    made = summariser(kind)
    position = torch.arange(len(block))[None]
    beside = made._addends(block[None], torch.zeros(1, R - 1, Z, dtype=block.dtype), position)
    means = beside.mean(dim=1, keepdim=True)
    return made._extra(block.mean(dim=0)[None, None], means, torch.tensor([[level]]))[0, 0]


@torch.no_grad()
def test_what_stands_beside_the_mean_is_what_it_is_called():
    block = torch.randn(R, Z, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(extra_of("variance", block, 1), block.var(dim=0, unbiased=False))
    # L1: half the distances of neighbours, L2: those of L1's neighbours, ...
    first = (block[1:] - block[:-1]).abs() / 2
    second = (first[1:] - first[:-1]).abs() / 2
    found = extra_of("half-distances", block, 1).unflatten(0, (R - 1, Z))
    torch.testing.assert_close(found[0], first.sum(dim=0) / R)
    torch.testing.assert_close(found[1], second.sum(dim=0) / R)
    # the mean of a half: twice the mean of the block says how often each entry is in it
    halves = extra_of("subsets", block, 1).unflatten(0, (SUBSETS, Z))
    pairs = torch.stack([block[[a, b]].mean(dim=0) for a, b in itertools.combinations(range(R), 2)])
    assert torch.cdist(halves, pairs).amin(dim=1).max() < 1e-9
    # a pooling lies within the block
    pooled = extra_of("pooling", block, 1).unflatten(0, (POOLS, Z))
    assert (pooled <= block.amax(dim=0)).all() and (pooled >= block.amin(dim=0)).all()


@torch.no_grad()
def test_subsets_of_a_level_are_of_its_own_size():
    block = torch.randn(R * R, Z, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    halves = extra_of("subsets", block, 2).unflatten(0, (SUBSETS, Z))
    assert halves.std(dim=0).min() > 0.01
    ones = extra_of("subsets", torch.ones_like(block), 2)
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_a_mean_alone_adds_nothing():
    made = summariser("mean")
    blocks = Entries(torch.ones(1, 1, dtype=torch.long), *[torch.zeros(1, 1, dtype=torch.long)] * 2)
    latents = torch.randn(1, 2, Z, dtype=torch.float64)
    x = made._embed(latents, latents[..., :0], latents[:, :1], blocks)
    assert x.shape == (1, 4, 16) and made.addends == 0


def test_the_command_compares_all(trained_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--minutes", "0.002", "--seeds", "2", "--chunks", "50", "--json", "s.json"]
    assert cli.main(["summaries", "--run", str(trained_run), *small]) == 0
    out = capsys.readouterr().out
    assert all(f"| {kind}" in out for kind in KINDS)
    rows = json.loads(Path("s.json").read_text())["compared"]
    assert [row["kind"] for row in rows] == list(KINDS)
    assert "more" not in rows[0] and all(row["more_seed_error"] > 0 for row in rows[1:])


def test_a_twin_is_refused_in_one_line(refused):
    assert "has no pyramid of latents" in refused(cli.main(["summaries", "--run", "small-twin"]))
