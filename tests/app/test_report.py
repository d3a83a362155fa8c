"""A report says what was measured, whatever the text holds, and stands on its own."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from hldm import cli
from hldm.app.page import finite
from hldm.app.report.build import PAGE_MARK, build_report
from hldm.app.report.denoising import denoising_path
from hldm.app.report.gather import read_evaluation, read_run, with_ends
from hldm.app.report.passage import Chunks, describe_passage, latent_map, nearest, principal_axes, read_text
from hldm.commands import report as command
from hldm.evaluation.bound import evaluate_bound, held_out_windows
from hldm.evaluation.evaluate import evaluate_run
from hldm.generation.pipeline import read_pipeline
from hldm.generation.writer import LatentWriter
from hldm.model.diffusion import alpha_sigma
from hldm.text.bytes import END_MARK, count_characters
from hldm.text.corpus import make_corpus

HOSTILE = b"</script><script>alert(1)</script> <img src=x onerror=alert(2)> '\" {{ 7 * 7 }} \xe2\x80\xae "


@pytest.fixture(scope="module")
def evaluated_run(trained_run, tmp_path_factory) -> Path:
    """A trained run with its evaluation, as `hldm demo` leaves it. Read only."""
    folder = Path(shutil.copytree(trained_run, tmp_path_factory.mktemp("runs") / "small"))
    evaluation = evaluate_run(folder, draws=2, prompts=2, max_characters=20)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture(scope="module")
def page(evaluated_run) -> str:
    return build_report(evaluated_run)


class Outline(HTMLParser):
    """Tags that open and close, ids, and addresses that a page would load or lead to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.addresses += [found[key] for key in ("src", "href", "action", "data") if key in found]
        self.handlers += [key for key in found if key.startswith("on")]
        if tag not in {"meta", "link", "input", "line", "polyline", "circle", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# ---- the page


def test_the_page_is_whole_and_loads_nothing(page):
    outline = Outline(page)
    assert page.encode().startswith(PAGE_MARK) and outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert all(address.startswith(("#", "data:")) for address in outline.addresses)
    assert all(address[1:] in outline.ids for address in outline.addresses if address.startswith("#"))
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    sections = {"passage", "map", "denoising", "samples", "figures", "parts", "training", "faults", "origin"}
    assert sections <= set(outline.ids)


def test_what_the_evaluation_says_is_what_the_page_says(page, evaluated_run, corpus_path):
    bits = read_evaluation(evaluated_run / "evaluation.json")["bits_per_character"]
    assert f"{bits['bound']:.3f}" in page and f"{bits['latent']:.4f}" in page
    for stage in ("Stage one", "Stage two"):
        assert stage in page
    private = ("argv", str(evaluated_run.parent), str(corpus_path.parent))
    assert not any(word in page for word in private) and corpus_path.name in page


def test_ends_of_documents_are_seen_and_explained(page, evaluated_run):
    (passage,) = re.findall(r'<div class="text" id="chunks".*?</div>', page, re.S)
    opens = [chunk["opens"] for chunk in data_of(page)["passage"]]
    assert sum(opens[1:]) == passage.count(f'<span class="ends" aria-hidden="true">{END_MARK}</span>') > 0
    assert f"{END_MARK}</span> a document ends, another begins" in page
    texts, opens = [b"ab", "c\u00e9".encode(), b"d"], np.array([True, False, True])
    assert with_ends(texts, opens) == f"abc\u00e9{END_MARK}\nd"


def test_the_other_runs_bits_are_compared_in_words(evaluated_run, tmp_path):
    other = Path(shutil.copytree(evaluated_run, tmp_path / "twin"))
    page = build_report(evaluated_run, against=other)
    assert "bits of twin; small takes 1.00 times as many" in page and "×" not in page.split("<nav")[0]


def test_no_text_becomes_markup_or_script(evaluated_run, tmp_path, monkeypatch):
    monkeypatch.setattr("hldm.app.report.gather.evaluate_run", lambda folder, text: None)
    monkeypatch.setattr("hldm.app.report.gather.parts_of_run", lambda folder, **options: None)
    text = tmp_path / "text.txt"
    text.write_bytes(HOSTILE * 20)
    page = build_report(evaluated_run, text=text)
    outline = Outline(page)
    assert outline.open == [] and outline.handlers == [] and "img" not in outline.tags
    assert outline.tags.count("script") == 3  # data, theme, report
    shown = "".join(chunk["text"] for chunk in data_of(page)["passage"])
    # as it stands in the text; what steers a reading direction is shown as an escape
    assert "</script><script>alert(1)" in shown and "49" not in shown and "\\u202e" in shown


def test_the_twin_has_no_map_and_no_walk(small_twin, tmp_path):
    from hldm.training.stages import train_autoencoder

    folder = train_autoencoder(small_twin, root=tmp_path / "runs")
    evaluation = evaluate_run(folder, draws=2, prompts=0)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    page = build_report(folder)
    assert "The twin has no latents" in page and "byte by byte" in page
    data = data_of(page)
    assert data["map"] is None and data["paths"] == [] and data["passage"][0]["mu"] == []


def test_a_run_in_training_shows_its_curves_and_says_what_is_missing(evaluated_run, tmp_path):
    folder = Path(shutil.copytree(evaluated_run / "autoencoder", tmp_path / "half" / "autoencoder")).parent
    (folder / "autoencoder" / "totals.json").unlink()
    page = build_report(folder)
    assert "Stage one" in page and "<polyline" in page
    assert "there is no pipeline" in page and "still training, or was stopped" in page
    assert Outline(page).open == []


def test_a_folder_without_its_text_says_so_and_can_be_given_another(evaluated_run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hldm.app.report.gather.corpora_of_run", lambda folder: Path("/nowhere/text.txt").read_bytes()
    )
    page = build_report(evaluated_run)
    assert "its text is not here" in page and "--text FILE" in page and 'class="chunk' not in page


def test_two_runs_stand_side_by_side(evaluated_run, tmp_path):
    other = Path(shutil.copytree(evaluated_run, tmp_path / "again"))
    page = build_report(evaluated_run, against=other)
    assert "Dashed: again" in page and "dashed" in page
    found = data_of(page)["passage"]
    assert all(chunk["other"] == chunk["latent"] + chunk["decoder"] for chunk in found[:3]) or all(
        chunk["other"] == pytest.approx(chunk["latent"] + chunk["decoder"], abs=0.02) for chunk in found
    )


# ---- what is measured for it


@pytest.fixture(scope="module")
def models(trained_run):
    pipeline = read_pipeline(trained_run / "pipeline")
    return pipeline.autoencoder.eval(), pipeline.prior.eval(), pipeline.settings


@pytest.fixture(scope="module")
def corpus(corpus_path):
    return make_corpus("text", [part.encode() for part in corpus_path.read_text().split("\n\n")[:4]])


def test_the_bits_of_the_chunks_add_up_to_the_bound(models, corpus):
    autoencoder, prior, _ = models
    chunks = read_text(autoencoder, prior, corpus)
    assert b"".join(chunks.texts) == corpus.text.tobytes() and chunks.opens.sum() == len(corpus)
    windows = held_out_windows(autoencoder, corpus)
    generator = torch.Generator().manual_seed(1)
    bound = evaluate_bound(autoencoder, prior, windows, draws=32, generator=generator).bits_per_character()
    characters = count_characters(corpus.text.tobytes())
    assert chunks.bits.sum() / characters == pytest.approx(bound["bound"], rel=0.03)
    assert chunks.latent.sum() / characters == pytest.approx(bound["latent"] + bound["end"], rel=0.1)


def test_neighbours_are_the_nearest_other_texts():
    texts = [b"a", b"b", b"a", b"c", b"d"]
    latents = np.array([[0.0], [3.0], [0.1], [1.0], [-2.0]])
    none = np.zeros(5)
    chunks = Chunks(texts, none > 0, none, none, latents, none > 0)
    assert [(texts[k], distance) for k, distance in nearest(chunks, 0)] == [
        (b"c", 1.0),
        (b"d", 2.0),
        (b"b", 3.0),
    ]


def test_the_map_keeps_the_directions_of_most_variance():
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(500, 5)) * [1, 4, 0.1, 2, 0.1] + 3
    mean, axes, share = principal_axes(latents)
    assert np.abs(axes[1, 0]) > 0.99 and np.abs(axes[3, 1]) > 0.99 and share.sum() > 0.9
    assert mean == pytest.approx(latents.mean(axis=0))
    _, flat, one = principal_axes(latents[:, :1])
    assert flat.shape == (1, 2) and one.tolist() == [pytest.approx(1.0), 0.0]


def test_the_map_shows_every_text_once_where_it_lies(models, corpus):
    autoencoder, prior, _ = models
    chunks = read_text(autoencoder, prior, corpus)
    found = latent_map(chunks)
    labels = [point["text"] for point in found["points"]]
    assert len(labels) == len(set(labels)) and labels[0] == describe_passage(chunks)[0]["label"]
    point, mean, axes = found["points"][0], np.array(found["mean"]), np.array(found["axes"])
    assert [point["x"], point["y"]] == pytest.approx(axes @ (chunks.latents[0] - mean), abs=2e-3)


def test_a_walk_ends_where_the_writer_would(models):
    autoencoder, prior, settings = models
    prompt = b"And the king said "
    path = denoising_path(autoencoder, prior, prompt, settings, steps=5, seed=3)
    generators = [torch.Generator().manual_seed(3)]
    from hldm.config import changed

    writer = LatentWriter(autoencoder, prior, [prompt], changed(settings, steps=5), generators)
    with torch.no_grad():
        z_0 = writer.sample_latents()[0]
    last = path["steps"][-1]
    assert len(path["steps"]) == 6 and last["z"] == pytest.approx(z_0.tolist(), abs=2e-3)
    alpha_0, _ = alpha_sigma(torch.tensor(prior.diffusion.gamma_0))
    assert last["guess"] == pytest.approx((z_0 / alpha_0).tolist(), abs=2e-3)
    snrs = [step["log_snr"] for step in path["steps"]]
    assert snrs == sorted(snrs) and snrs[-1] == pytest.approx(-prior.diffusion.gamma_0, abs=0.01)


def test_json_holds_no_number_that_it_cannot():
    found = finite({"a": [1.0, float("nan")], "b": {"c": float("inf")}, "d": "x"})
    assert found == {"a": [1.0, None], "b": {"c": None}, "d": "x"}


# ---- the command


def test_the_command_says_what_it_wrote_and_writes_over_its_own_pages_alone(
    evaluated_run, tmp_path, monkeypatch, capsys, refused
):
    monkeypatch.chdir(tmp_path)
    assert command.MARK == PAGE_MARK
    page = evaluated_run / "report.html"
    page.write_bytes(PAGE_MARK)  # an earlier one
    assert cli.main(["report", str(evaluated_run)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {page} (") and not list(Path().glob("*.html"))
    assert page.stat().st_size > 10_000
    page.unlink()
    Path("mine.html").write_text("<html>my own</html>")
    assert "mine.html is there" in refused(cli.main(["report", str(evaluated_run), "--html", "mine.html"]))
    assert Path("mine.html").read_text() == "<html>my own</html>"


def spoil_evaluation(folder: Path) -> None:
    (folder / "evaluation.json").write_text('{"bits_per_character": {"bound": "x"}}')


def spoil_weights(folder: Path) -> None:
    path = folder / "pipeline" / "prior" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_config(folder: Path) -> None:
    (folder / "autoencoder" / "config.yaml").write_text("name: [")


def spoil_environment(folder: Path) -> None:
    (folder / "autoencoder" / "environment.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_evaluation, "evaluation.json is no evaluation"),
        (spoil_weights, "cannot be loaded"),
        (spoil_config, "config.yaml"),
        (spoil_environment, "environment.json is damaged"),
        (lambda folder: shutil.rmtree(folder), "is no folder here"),
        (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "holds no run"),
    ],
)
def test_what_is_broken_is_one_line(spoil, named, evaluated_run, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(evaluated_run, "run"))
    spoil(folder)
    assert named in refused(cli.main(["report", "run"]))
    assert not Path("run-report.html").exists() and not Path("run/report.html").exists()


def test_figures_of_other_weights_are_measured_again(evaluated_run, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(evaluated_run, tmp_path / "run"))
    found = json.loads((folder / "evaluation.json").read_text())
    monkeypatch.setattr("hldm.app.report.gather.evaluate_run", lambda folder, text: {**found, "seed": 77})
    said: list[str] = []
    assert read_run(folder, say=said.append).evaluation["seed"] == 0 and said == []
    assert read_run(folder, say=said.append, measure=True).evaluation["seed"] == 77
    (folder / "evaluation.json").write_text(json.dumps({**found, "model": "0" * 64}))
    assert read_run(folder, say=said.append).evaluation["seed"] == 77
    assert "is of other weights" in said[1]


def test_a_text_that_is_empty_is_refused(evaluated_run, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="white space"):
        read_run(evaluated_run, text=tmp_path / "empty.txt")


def test_an_exported_folder_says_what_it_has_not(evaluated_run, tmp_path, monkeypatch):
    from hldm.runs.export import export_run

    export_run(evaluated_run, tmp_path / "shared")
    text = tmp_path / "text.txt"
    text.write_text("And it came about in those days that the king went up. " * 20)
    monkeypatch.setattr("hldm.app.report.gather.evaluate_run", lambda folder, text: None)
    monkeypatch.setattr("hldm.app.report.gather.parts_of_run", lambda folder, **options: None)
    page = build_report(tmp_path / "shared", text=text)
    assert "no metrics.jsonl: this run was exported" in page and "There are no curves" in page
    assert 'class="chunk' in page and str(tmp_path) not in page.replace(str(text), "")
