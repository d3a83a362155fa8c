"""Two views: what is read is what was said, each view by itself, and the loss falls with and without the distance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from jepa_small import SMALL, small

from hldm import cli
from hldm.chunking.chunker import make_chunker
from hldm.config import ConfigError
from hldm.jepa.config import JepaConfig
from hldm.jepa.pairs import END, SEP, PairObjective, joined, last_of, read_symbols, write_views
from hldm.jepa.text_pairs import PairBatch, pairs_of, read_corpora, read_views
from hldm.text.bytes import START

SUMS = [
    "task=pairs",
    "pairs.source=sums",
    "pairs.count=40",
    "objective.option=latents",
    "objective.distance=cosine",
]


def objective_of(*switches: str) -> tuple[PairObjective, PairBatch, JepaConfig]:
    config = small(*SUMS, "objective.target=own", *switches)
    torch.manual_seed(0)
    corpora = read_corpora(config)
    batch = pairs_of(config, corpora["train"], corpora["train"], make_chunker(config.chunking), 4).batch(0)
    return PairObjective(config), batch, config


def step(objective: PairObjective, batch: PairBatch, seed: int = 0):
    carry = objective.initial_carry(4, torch.device("cpu"))
    return objective(batch, carry, torch.Generator().manual_seed(seed), 0.5)


def test_pieces_are_laid_one_after_another():
    a, b = torch.tensor([[1, 2, 0], [3, 0, 0]]), torch.tensor([[7, 0], [8, 9]])
    rows = {"rows": 2, "device": torch.device("cpu")}
    symbols, length = joined(START, (a, torch.tensor([2, 1])), SEP, (b, torch.tensor([1, 2])), END, **rows)
    assert symbols.tolist() == [
        [START, 1, 2, SEP, 7, END],
        [START, 3, SEP, 8, 9, END],
    ] and length.tolist() == [6, 6]


@pytest.mark.parametrize(
    "switches",
    [
        ["objective.latent_weight=0"],
        ["objective.latent_weight=1"],
        ["objective.target=ema", "pairs.predictions=0"],
        ["objective.target=gradient", "objective.distance=l2", "pairs.predictions=2"],
        ["pairs.loss_dropout=0.5"],
    ],
    ids=" ".join,
)
def test_a_few_steps_lower_the_loss(switches):
    objective, batch, _ = objective_of(*switches)
    optimizer = torch.optim.AdamW(objective.train().parameters(), lr=3e-3)
    losses = []
    for index in range(12):
        out = step(objective, batch, index)
        optimizer.zero_grad()
        out.loss.backward()
        objective.end_step(skipped=False)
        optimizer.step()
        losses.append(out.nats["next_byte"].item())
    assert losses[-1] < 0.9 * losses[0]


def test_only_the_second_view_and_its_end_are_asked_for():
    objective, batch, _ = objective_of("objective.latent_weight=0")
    nats, counted = objective.eval().next_byte_nats(batch)
    assert int(counted) == int(batch.target.length.sum()) + 4
    row, a, b = 1, int(batch.context.length[1]), int(batch.target.length[1])
    text = batch.context.bytes[row, :a].tolist(), batch.target.bytes[row, :b].tolist()
    symbols = torch.tensor([[START, *text[0], SEP, *text[1], END]])
    hidden = read_symbols(objective.twin, objective.twin.write(symbols[:, :-1]), torch.tensor([a + b + 2]))
    logp = objective.twin.outputs(hidden).log_softmax(-1)[0].gather(1, symbols[0, 1:, None])[a + 1 :]
    single = PairBatch(*(part_of(part, row) for part in (batch.context, batch.target)))
    torch.testing.assert_close(objective.next_byte_nats(single)[0], -logp.sum(), rtol=1e-4, atol=1e-4)
    assert nats > -logp.sum()


def part_of(window, row: int):
    from dataclasses import replace

    keep = {
        name: getattr(window, name)[row : row + 1]
        for name in ("bytes", "length", "doc_start", "doc_end", "chunk_start")
    }
    return replace(window, **keep)


def test_neither_view_knows_of_the_other():
    objective, batch, _ = objective_of()
    predicted, encoded = objective.eval().predicted(batch), objective.encoded(batch)
    swapped = PairBatch(batch.context, batch.context)
    torch.testing.assert_close(objective.predicted(swapped), predicted, rtol=0, atol=0)
    swapped = PairBatch(batch.target, batch.target)
    torch.testing.assert_close(objective.encoded(swapped), encoded, rtol=0, atol=0)


def test_views_in_one_row_with_a_reset_between_are_the_views_by_themselves():
    objective, batch, _ = objective_of("pairs.predictions=0")
    twin = objective.eval().twin
    (a, size_a), (b, size_b) = objective._views(batch)
    symbols, length = joined(START, (a, size_a), START, (b, size_b), END, rows=4, device=a.device)
    place = torch.arange(symbols.shape[1])
    opens = (place == 0) | (place == size_a[:, None] + 1)
    hidden, _ = twin.decoder(twin.write(symbols), twin.decoder.initial_state(4), opens, opens, length)
    torch.testing.assert_close(last_of(hidden, length), objective.encoded(batch), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_of(hidden, size_a + 1), objective.predicted(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("target", "has"), [("own", False), ("gradient", True), ("ema", False)])
def test_a_gradient_reaches_the_second_view_only_when_asked(target, has):
    objective, batch, _ = objective_of(f"objective.target={target}")
    assert objective.train().encoded(batch).requires_grad is has
    assert objective.predicted(batch).requires_grad


def test_without_its_weight_or_when_dropped_the_distance_costs_nothing(monkeypatch):
    for switches in (["objective.latent_weight=0"], ["pairs.loss_dropout=0.99"]):
        objective, batch, _ = objective_of(*switches)
        monkeypatch.setattr(objective, "predicted", lambda batch: 1 / 0)
        step(objective, batch)
    objective, batch, _ = objective_of()
    with_distance = step(objective, batch)
    baseline, batch, _ = objective_of("objective.latent_weight=0")
    baseline.load_state_dict(objective.state_dict())
    assert step(baseline, batch).loss < with_distance.loss
    torch.testing.assert_close(step(baseline, batch).nats, with_distance.nats)


def test_a_model_that_knows_its_pairs_writes_them_to_their_end():
    objective, batch, _ = objective_of("objective.latent_weight=0", "encoder.width=32")
    optimizer = torch.optim.AdamW(objective.train().parameters(), lr=1e-2)
    for _ in range(80):
        loss = step(objective, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    objective.eval()
    views = [
        [bytes(row[:size].tolist()) for row, size in zip(part.bytes, part.length.tolist(), strict=True)]
        for part in (batch.context, batch.target)
    ]
    assert write_views(objective.twin, views[0], 60) == views[1]
    assert write_views(objective.twin, views[0], 2) == [
        view[:2] + b"\0" for view in views[1]
    ]  # cut short: no match


def test_halves_of_a_window_are_one_text(corpus_path):
    config = small(
        "task=pairs", "pairs.source=halves", "objective.option=latents", f"data.path={corpus_path}"
    )
    corpora = read_corpora(config)
    source = pairs_of(config, corpora["train"], corpora["train"], make_chunker(config.chunking), 4)
    batch = source.batch(0)
    assert set(batch.context.length.tolist()) == set(batch.target.length.tolist()) == {32}
    objective = PairObjective(config)
    assert int(objective.next_byte_nats(batch)[1]) == 4 * (64 + 2)
    text = corpora["train"].text.tobytes()
    joined_halves = bytes(batch.context.bytes[0].tolist()) + bytes(batch.target.bytes[0].tolist())
    assert text.find(joined_halves) % 64 == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"text": "a"}\n', r"a\.jsonl:1: expected"),
        ('{"text": "a", "code": "b"}\n{"text": "a", "code": " "}\n', r"a\.jsonl:2"),
        ('["a", "b"]\n', r"a\.jsonl:1"),
        ('{"text": 1, "code": "b"}\n', r"a\.jsonl:1"),
        ('{"text": "a\\u0000", "code": "b"}\n', r"a\.jsonl:1"),
        ('{"text": "\\ud800", "code": "b"}\n', r"a\.jsonl:1"),
        ("no JSON\n", r"a\.jsonl:1"),
        ("\n", "holds no pairs"),
    ],
)
def test_bad_pairs_are_refused_in_one_line(tmp_path, text, says):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_views(path)


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        (["task=pairs", "objective.option=latents"], "must name files"),
        (["task=pairs", "pairs.source=sums"], "objective.option must be latents"),
        (["pairs.train=x"], "belong together"),
    ],
)
def test_settings_that_cannot_be_are_refused(switches, says):
    with pytest.raises(ConfigError, match=says):
        small(*switches)


def test_the_command_trains_on_pairs_and_counts_matches(tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"lines with {n}", "code": f"[a-z]{{{n}}}"} for n in range(1, 31)]
    Path("pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = [
        "train",
        "--config",
        str(ROOT / "configs/jepa-tiny.yaml"),
        *SMALL,
        "task=pairs",
        "objective.option=latents",
    ]
    files = ["pairs.train=pairs.jsonl", "pairs.test=pairs.jsonl", "--name", "two", "logging.every=4"]
    assert cli.jepa([*arguments, *files, "--steps", "4", "objective.distance=cosine"]) == 0
    assert "gap" in capsys.readouterr().out
    assert cli.jepa(["match", "--run", "runs/two", "--json", "found.json"]) == 0
    assert "| two" in capsys.readouterr().out
    (record,) = json.loads(Path("found.json").read_text())["matches"]
    assert record["pairs"] == 30 and record["exact"] == 0 <= record["functional"]
    assert "--split is one of train, validation, test" in refused(
        cli.jepa(["match", "--run", "runs/two", "--split", "x"])
    )
    assert "hldm jepa train" in refused(cli.jepa(["match", "--run", "nowhere"]))
    Path("pairs.jsonl").write_text(json.dumps(rows[0]))
    assert "ten are needed" in refused(cli.jepa([*arguments, *files, "--name", "few"]))
