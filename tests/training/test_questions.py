"""Questions and answers: what is read of them, what counts in the loss, and what is reported."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from test_trainer import assert_same, weights

from hldm.chunking.chunker import make_chunker
from hldm.config import Config, ConfigError, DataConfig, changed, load_config
from hldm.evaluation.bound import evaluate_bound, held_out_windows
from hldm.evaluation.validation import slice_of, validation_on
from hldm.generation.pipeline import read_pipeline
from hldm.jepa.config import load_jepa_config
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.runs.exits import Interrupted
from hldm.runs.folder import last_validation
from hldm.runs.progress import describe
from hldm.sources.corpora import load_corpora
from hldm.text.corpus import make_corpus
from hldm.text.windows import Windows
from hldm.training.objectives import AutoencoderObjective, PriorObjective, Step
from hldm.training.stages import train_autoencoder, train_run
from hldm.training.trainer import Trainer

COLUMNS = ("data.question=question", "data.field=answer")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A hundred sums, some with CR LF."""
    rows = [
        {
            "question": f"what is\r\n{a} and {b}?" if a == 3 else f"what is {a} and {b}?",
            "answer": f"it is {a + b}.",
        }
        for a in range(10)
        for b in range(10)
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(path: Path, *overrides: str, twin: bool = False) -> Config:
    small = [o for o in SMALL if not twin or "latent_dim" not in o]
    file = ROOT / f"configs/tiny{'-twin' * twin}.yaml"
    more = [f"data.path={path}", *COLUMNS, *overrides]
    return changed(load_config([file], [*small, *more]), name="small")


def make_objective(config: Config, stage: str) -> AutoencoderObjective | PriorObjective:
    torch.manual_seed(0)
    autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking)
    if stage == "autoencoder":
        return AutoencoderObjective(autoencoder, config.autoencoder, config.diffusion.gamma_0)
    prior = Prior.from_settings(config.autoencoder, config.prior, config.hierarchy, config.diffusion)
    return PriorObjective(prior, autoencoder)


def make_windows(config: Config, question_weight: float) -> Windows:
    corpus = load_corpora(config.data)["train"]
    chunker = make_chunker(config.chunking)
    return Windows(corpus, chunker, lanes=4, window_bytes=64, question_weight=question_weight)


def step_of(objective, windows: Windows, first: int = 0, rows: int = 4) -> Step:
    carry = objective.initial_carry(rows, torch.device("cpu"))
    return objective.eval()(windows.batch(0, first, rows), carry, torch.Generator().manual_seed(5), 0.5)


def test_a_document_is_a_question_a_line_end_and_an_answer(path):
    corpora = load_corpora(make_config(path).data)
    documents = [d.tobytes() for corpus in corpora.values() for d in corpus]
    sizes = np.concatenate([corpus.question_bytes for corpus in corpora.values()]).tolist()
    assert len(documents) == 100 and b"what is\n3 and 4?\nit is 7." in documents
    for document, size in zip(documents, sizes, strict=True):
        assert document[:size].endswith(b"?\n") and document[size:].startswith(b"it is ")


def test_where_the_questions_end_is_part_of_the_fingerprint(path):
    corpus = load_corpora(make_config(path).data)["train"]
    again = [corpus.beginning(index).up_to(3) for index in range(len(corpus))]
    assert type(corpus)(corpus.name, corpus.text, corpus.offsets).fingerprint != corpus.fingerprint
    assert make_corpus("other", again).fingerprint != corpus.fingerprint


def test_parquet_columns_are_read_as_jsonl_is(path, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "sums.parquet")
    found, expected = (load_corpora(make_config(p).data) for p in (tmp_path / "sums.parquet", path))
    assert {k: v.fingerprint for k, v in found.items()} == {k: v.fingerprint for k, v in expected.items()}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "why?"}, "no field 'answer'; set data.field to one of"),
        ({"answer": "so."}, "no field 'question'; set data.question to one of"),
        ({"question": "why?", "answer": " "}, "a question without an answer"),
        ({"question": 3, "answer": "so."}, "must be text, got int"),
    ],
)
def test_a_row_without_its_half_is_named(row, message, path):
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        load_corpora(make_config(path).data)


def test_what_has_no_columns_or_too_few_rows_is_refused(path, tmp_path):
    (tmp_path / "plain.txt").write_text("no columns here")
    with pytest.raises(ConfigError, match=r"plain text has no column 'question'"):
        load_corpora(make_config(tmp_path / "plain.txt").data)
    path.write_text('{"question": "why?", "answer": "so."}\n' * 2)
    with pytest.raises(ConfigError, match="questions leave none for some split"):
        load_corpora(make_config(path).data)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.question=question"], "is a column of data.path or data.dataset"),
        (["data.path=x.jsonl", "data.question=text"], "must be two columns"),
        (["data.path=x.jsonl", "data.question=q", "data.stream=true"], "stream=false"),
        (["data.question_weight=-1"], "question_weight"),
        (["data.question_weight=1.5"], "question_weight"),
    ],
)
def test_settings_that_cannot_be_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config([], overrides)


def test_jepa_has_no_questions():
    with pytest.raises(ConfigError, match="no question and no answer"):
        load_jepa_config([], ["data.path=x.jsonl", "data.question=q"])


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_weights_are_those_of_the_chunks_and_1_in_the_mean_over_bytes(path, weight):
    windows = make_windows(make_config(path), weight)
    for step in range(windows.windows_per_epoch):
        batch = windows.batch(step)
        ratio = torch.zeros(batch.weight.shape)
        for row, chunk in batch.is_chunk.nonzero().tolist():
            text = windows.corpus.text
            first = np.flatnonzero(windows.chunk_start)[batch.chunk_index[row, chunk]]
            document = np.searchsorted(windows.corpus.offsets, first, side="right") - 1
            in_question = first - windows.corpus.offsets[document] < windows.corpus.question_bytes[document]
            ratio[row, chunk] = weight if in_question else 1.0
            assert in_question == (
                b"it is" not in text[windows.corpus.offsets[document] : first + 5].tobytes()
            )
        torch.testing.assert_close(batch.weight, ratio / ratio.max() * batch.weight.max())
        size = (batch.last_byte - batch.first_byte + 1) * batch.is_chunk
        assert float((batch.weight * size).sum()) == pytest.approx(batch.total_bytes, rel=1e-5)
    assert make_windows(make_config(path), 1.0).batch(0).weight is None


def test_every_answer_starts_a_chunk(path):
    for strategy in ("words", "fixed", "sentence"):
        windows = make_windows(make_config(path, f"chunking.strategy={strategy}"), 0.0)
        corpus = windows.corpus
        assert windows.chunk_start[corpus.offsets[:-1] + corpus.question_bytes].all()


@torch.no_grad()
@pytest.mark.parametrize("stage, twin", [("autoencoder", False), ("prior", False), ("autoencoder", True)])
def test_the_loss_is_the_sum_of_its_weighted_parts(path, stage, twin):
    """Linear in the weight: what questions cost and what answers cost, each of it, from three weights alone."""
    config = make_config(path, twin=twin)
    objective = make_objective(config, stage)
    hold = 0.0
    if stage == "autoencoder" and not twin:  # the normaliser's term is no part of the bound and always counts
        state = objective.autoencoder.encoder_state(4)
        encoding, _ = objective.eval().autoencoder.encode(make_windows(config, 1.0).batch(0), state)
        hold = float((objective.autoencoder.normaliser.hold(encoding.latents) * encoding.mask).sum())

    def cost(weight: float) -> float:
        """Of the batch, before its weights are scaled to 1 in the mean."""
        windows = make_windows(config, weight)
        batch = windows.batch(0)
        scale = 1.0 if batch.weight is None else float(batch.weight.max())
        return (float(step_of(objective, windows).loss) * batch.total_bytes - hold) / scale

    answers, plain = cost(0.0), cost(1.0)
    assert 0 < answers < plain
    for weight in (0.25, 0.5):
        assert cost(weight) == pytest.approx(answers + weight * (plain - answers), rel=1e-4)
    nats = step_of(objective, make_windows(config, 0.0)).nats  # what is reported is not weighted
    assert nats.keys() == step_of(objective, make_windows(config, 1.0)).nats.keys()
    for name, value in step_of(objective, make_windows(config, 1.0)).nats.items():
        torch.testing.assert_close(nats[name], value)


def test_the_bytes_of_questions_have_no_gradient(path):
    config = make_config(path, twin=True)
    objective = make_objective(config, "autoencoder")
    for weight, learns in ((0.0, False), (1.0, True)):
        objective.zero_grad()
        step_of(objective, make_windows(config, weight)).loss.backward()
        bias = objective.autoencoder.outputs.bias.grad  # softmax - target, summed over what counts
        batch = make_windows(config, weight).batch(0)
        events = objective.autoencoder.events(batch, objective.autoencoder.decoder_state(4))
        counts = (
            torch.ones(events.target.shape) if batch.weight is None else batch.weight.gather(1, events.chunk)
        )
        question_mark = (events.target == ord("?")) & events.mask
        assert bool((counts[question_mark] > 0).any()) == learns
        assert (float(bias[ord("?")]) < 0) == learns


@torch.no_grad()
@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_two_streams_add_up_to_the_batch(path, stage):
    config = make_config(path)
    objective, windows = make_objective(config, stage), make_windows(config, 0.1)
    whole = step_of(objective, windows).loss
    parts = [step_of(objective, windows, first, rows).loss for first, rows in ((0, 1), (1, 3))]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


def test_a_run_stopped_by_a_signal_goes_on_to_the_same_weights(path, tmp_path, monkeypatch):
    config = make_config(path, "data.question_weight=0.1")
    straight = weights(train_autoencoder(config, root=tmp_path / "straight") / "autoencoder")
    original, steps = Trainer.step, []

    def step_then_signal(self: Trainer, progress: float) -> dict[str, float] | None:
        steps.append(progress)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, progress)

    monkeypatch.setattr(Trainer, "step", step_then_signal)
    with pytest.raises(Interrupted):
        train_autoencoder(config, root=tmp_path / "stopped")
    resumed = train_autoencoder(config, resume=True, root=tmp_path / "stopped")
    assert_same(straight, weights(resumed / "autoencoder"))


def test_validation_reports_the_bound_and_the_answers_alone(path, tmp_path, monkeypatch):
    monkeypatch.setattr("hldm.training.stages.VALIDATION_BYTES", 200)
    config = make_config(path)
    run = train_run(config, root=tmp_path, validation=validation_on)
    found = last_validation(run)
    pipeline = read_pipeline(run / "pipeline")
    windows = held_out_windows(pipeline.autoencoder, slice_of(load_corpora(config.data)["validation"], 200))
    bound = evaluate_bound(
        pipeline.autoencoder, pipeline.prior, windows, draws=4, generator=torch.Generator().manual_seed(0)
    )
    characters = int(
        (windows.corpus.offsets[1:] - windows.corpus.offsets[:-1] - windows.corpus.question_bytes).sum()
    )
    nats = bound.by_chunk[windows.is_answer].sum()
    assert found["answer"] == pytest.approx(nats / math.log(2) / characters, abs=1e-6)
    assert found["bound"] == pytest.approx(bound.bits_per_character()["bound"], abs=1e-6)


def test_the_line_of_a_training_says_what_answers_cost_apart_from_the_terms_of_the_bound():
    metrics = {"latent": 0.5, "end": 0.0, "characters_per_second": 1000.0}
    validation = {"bound": 2.0, "latent": 1.0, "decoder": 1.0, "end": 0.0, "answer": 0.25}
    assert "validation 2.000 bits/char (latent 1.000 + decoder 1.000 + end 0.000)" in describe(
        metrics, validation
    )
    assert "answers 0.250" in describe(metrics, validation)
    assert "validation 2.000 answers 0.250" in describe({**metrics, "decoder": 1.0}, validation)


def test_text_without_questions_has_no_such_figure():
    corpus = load_corpora(DataConfig(max_bytes=2000))["validation"]
    chunker = make_chunker(load_config([]).chunking)
    assert Windows(corpus, chunker, lanes=2, window_bytes=64, question_weight=0.0).batch(0).weight is None
