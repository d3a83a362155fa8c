"""The harness' three questions, asked by requests of our own; and by the harness, where it is installed."""

from __future__ import annotations

import json
import math
import sys
from typing import Any, NamedTuple

import pytest

from hldm import cli
from hldm.evaluation.lm_eval import Adapter, register
from hldm.generation.pipeline import HLDMPipeline


class Request(NamedTuple):
    """As lm_eval.api.instance.Instance, of which no more is used."""

    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def adapter(saved_pipeline):
    return Adapter(run=str(saved_pipeline), draws=4, seed=3, batch_size=2)


@pytest.fixture(scope="module")
def pipeline(saved_pipeline):
    return HLDMPipeline.from_pretrained(saved_pipeline)


def test_likelihoods_are_those_of_score_in_nats(adapter, pipeline):
    pairs = [("And the king", " said"), ("", "Let us go up"), ("the town", "")]
    found = adapter.loglikelihood([Request(pair) for pair in pairs])
    options = dict(draws=4, seed=3, ends_document=False)
    expected = [
        -pipeline.score(" said", "And the king", **options)[0].bits * math.log(2),
        -pipeline.score("Let us go up", **options)[0].bits * math.log(2),
        0,
    ]
    assert [log_p for log_p, _ in found] == pytest.approx(expected, rel=1e-4)
    assert [is_greedy for _, is_greedy in found] == [False, False, True]


def test_rolling_likelihoods_are_those_of_whole_documents(adapter, pipeline):
    texts = ["And the king said", "Let us go up"]
    found = adapter.loglikelihood_rolling([Request((text,)) for text in texts])
    expected = [-score.bits * math.log(2) for score in pipeline.score(texts, draws=4, seed=3)]
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_tighter_bound_takes_the_place_of_the_first(saved_pipeline, pipeline):
    adapter = Adapter(run=str(saved_pipeline), samples=4)
    ((found, _),) = adapter.loglikelihood([Request(("", "sun"))])
    (score,) = pipeline.score("sun", samples=4, ends_document=False)
    assert found == pytest.approx(-score.importance * math.log(2), rel=1e-4)


def test_writing_ends_at_the_first_stop_and_answers_keep_their_order(adapter, pipeline):
    likeliest = dict(temperature=0.0, decoder_temperature=0.0, seed=3)
    whole = pipeline("And the", 12, **likeliest).texts[0]
    asked = [
        Request(("And the", {"until": [], "max_gen_toks": 12})),
        Request(("of the", {"until": ["zzz"], "max_gen_toks": 5, "do_sample": True, "temperature": 0.9})),
        Request(("And the", {"until": whole[3:5], "max_gen_toks": 12})),
        Request(("And the", {"until": [whole[6], whole[3:5]], "max_gen_toks": 12})),
    ]
    found = adapter.generate_until(asked)
    assert found[0] == whole and len(found[1]) <= 5
    assert found[2] == whole[: whole.index(whole[3:5])]
    assert found[3] == whole[: min(whole.index(whole[6]), whole.index(whole[3:5]))]


def test_whether_the_likeliest_writing_is_the_one_asked_about_is_found_out_on_request(
    saved_pipeline, pipeline
):
    adapter = Adapter(run=str(saved_pipeline), greedy=True)
    written = pipeline("And the", 6, temperature=0.0, decoder_temperature=0.0).texts[0]
    found = adapter.loglikelihood([Request(("And the", text)) for text in (written, "\x7f", written[:2])])
    assert [is_greedy for _, is_greedy in found] == [True, False, True]


def test_bad_arguments_are_refused_in_one_line(saved_pipeline, adapter):
    run = str(saved_pipeline)
    for call, says in (
        (lambda: Adapter(run=run, runs="x"), "model_args: hldm knows run, draws"),
        (lambda: Adapter(run=run, draws="many").loglikelihood([Request(("", "a"))]), "draws must be a whole"),
        (lambda: adapter.generate_until([Request(("a", {"num_beams": 4}))]), "gen_kwargs: hldm knows"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_without_the_harness_the_command_says_how_to_get_it(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert 'pip install "hldm[lm-eval]"' in refused(cli.main(["lm-eval", "--tasks", "x"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_the_harness_finds_the_model_and_its_numbers_are_those_of_score(
    saved_pipeline, pipeline, tmp_path, capsys
):
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model

    rows = [{"good": "the king said", "bad": "king the said"}, {"good": "he goes", "bad": "he go"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pairs.yaml").write_text(f"""
task: pairs_here
dataset_path: json
dataset_kwargs:
  data_files:
    train: {tmp_path}/rows.jsonl
output_type: multiple_choice
validation_split: train
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[good, bad]}}}}"
target_delimiter: ""
""")
    model = f"--model hldm --model_args run={saved_pipeline},draws=4 --device cpu".split()
    task = f"--tasks pairs_here --include_path {tmp_path} --log_samples --output_path {tmp_path}/out".split()
    assert cli.main(["lm-eval", *model, *task]) == 0
    assert get_model("hldm") is register() and "pairs_here" in capsys.readouterr().out
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    texts = [text for row in rows for text in (row["good"], row["bad"])]
    scores = pipeline.score(texts, draws=4, ends_document=False)
    expected = [-score.bits * math.log(2) for score in scores]
    answers = [float(answer[0][0]) for row in found for answer in row["resps"]]
    assert answers == pytest.approx(expected, rel=1e-4)
