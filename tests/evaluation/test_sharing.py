"""An exported run is whole anywhere: it loads, writes and is measured without its text, and names no place of ours."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import yaml

from hldm import cli
from hldm.evaluation import sharing
from hldm.evaluation.evaluate import evaluate_run
from hldm.evaluation.sharing import share_run
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.runs.export import public_name, without_places
from hldm.runs.folder import shipped_run
from hldm.runs.reports import save_report
from hldm.sources.notes import TextNote


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, trained_run, corpus_path) -> Path:
    """A folder with an export `slim` of the trained run, and its text nowhere near."""
    place = tmp_path_factory.mktemp("elsewhere")
    run = Path(shutil.copytree(trained_run, place / "small"))
    save_report(run / "evaluation.json", evaluate_run(run, draws=2, prompts=1, max_characters=10))
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        share_run(Path("small"), Path("slim"), licence="cc0-1.0", prompt="And\x1b[2J", say=said.append)
    (place / "said").write_text("\n".join(said))
    (place / "other.txt").write_text("The river ran by the old stone house, and the people sang. " * 30)
    shutil.rmtree(run)
    return place


@pytest.fixture
def there(elsewhere, tmp_path, monkeypatch) -> Path:
    """A copy of it as the current folder, for a test to change."""
    monkeypatch.chdir(shutil.copytree(elsewhere, tmp_path / "there"))
    return Path("slim")


def test_it_holds_what_it_says_and_nothing_that_only_training_needs(elsewhere, trained_run):
    folder = elsewhere / "slim"
    said = (elsewhere / "said").read_text()
    assert said.startswith("wrote slim, ") and "no scores" not in said and "no licence" not in said
    names = {path.name for path in folder.iterdir()}
    assert names == set(re.findall(r"^  (\S+)", said, re.MULTILINE))
    assert names == {"README.md", "pipeline", "autoencoder", "prior", "data.json", "evaluation.json"}
    stage = {"config.yaml", "environment.json", "totals.json"}
    assert {path.name for path in (folder / "prior").iterdir()} == stage
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "cc0-1.0" and front["library_name"] == "hldm"
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        *("# slim", "## Use", "## Scores", "## What each part is worth", "## A sample", "## Data"),
        *("## How it was made", "## Limits"),
    ]
    scores = json.loads((folder / "evaluation.json").read_text())
    bound = scores["bits_per_character"]["bound"]
    assert f"| {bound:.4f} |" in re.sub(" +", " ", card) and "\x1b" not in card
    data = json.loads((folder / "data.json").read_text())
    assert data["source"] == "text.txt" and data["splits"]["train"]["documents"] > 5
    assert f"{data['splits']['test']['bytes']:,}" in card
    totals = json.loads((folder / "prior/totals.json").read_text())
    assert data["splits"]["train"]["fingerprint"] == totals["corpus"]


def test_nothing_in_it_names_a_place_or_a_command_of_this_machine(elsewhere, trained_run, corpus_path):
    assert str(corpus_path) in (trained_run / "prior/config.yaml").read_text()
    assert "argv" in (trained_run / "prior/environment.json").read_text()
    for path in (elsewhere / "slim").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for word in (b"argv", b"/tmp", b"_name_or_path", str(corpus_path.parent).encode()):
                assert word not in data, path
    for path in shipped_run().parent.rglob("environment.json"):
        assert b"argv" not in path.read_bytes()


def test_it_writes_and_is_measured_like_the_run(there, trained_run, capsys):
    whole, slim = read_pipeline(trained_run / "pipeline"), HLDMPipeline.from_pretrained("slim")
    assert whole("And", max_characters=30).texts == slim("And", max_characters=30).texts
    tables = []
    for run in (str(trained_run), "slim"):
        arguments = ["--run", run, "--text", "other.txt", "--draws", "2", "--prompts", "1"]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", TextNote)
            assert cli.evaluate([*arguments, "--max-characters", "10"]) == 0
        out = capsys.readouterr().out
        rows = [re.sub(" +", " ", line) for line in out.splitlines()[4:] if "speed" not in line]
        assert rows[-1].startswith("only printed: --json FILE")
        assert (
            rows[-2] == f"What each part is worth on it: hldm diagnose --parts --run {run} --text other.txt"
        )
        assert not any("bits lost" in line for line in rows)
        tables.append([line for line in rows[:-2] if "random passage" not in line])
        is_here = run != "slim"
        missing = "the training text is not here (data.path=text.txt: no such file or folder)"
        assert (missing in " ".join(str(warning.message) for warning in said)) != is_here
        assert any("random passage" in line for line in rows) == is_here  # no row of what cannot be measured
    assert tables[0] == tables[1]


def test_it_is_diagnosed_and_judged_on_any_text(there, capsys):
    assert cli.main(["diagnose", "--run", "slim", "--text", "other.txt", "--draws", "2"]) == 0
    assert "other document" not in capsys.readouterr().out  # there is but one
    arguments = ["--text", "other.txt", "--prompts", "2", "--max-characters", "60", "--json", "j.json"]
    assert cli.main(["judge", "--run", "slim", *arguments]) == 0
    judged = json.loads(Path("j.json").read_text())["judged"]
    assert judged["true text"]["ngram_bits"] < judged["model"]["ngram_bits"]
    assert judged["model"]["copied"] is None and judged["model"]["known_words"] is None


@pytest.mark.parametrize("command", ["evaluate", "diagnose", "judge"])
def test_without_its_text_a_line_says_what_to_do(command, there, refused):
    error = refused(cli.main([command, "--run", "slim"]))
    assert "data.path=text.txt: no such file or folder; or pass --text with a file" in error


def test_another_text_of_that_name_is_not_taken_for_it(there, refused):
    shutil.copyfile("other.txt", "text.txt")
    error = refused(cli.main(["evaluate", "--run", "slim"]))
    assert "fingerprint" in error and "or pass --text" in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--text", "other.txt", "--split", "test"], "not both"),
        (["--text", "tiny.txt"], "holds a single chunk"),
        (["--text", "blank.txt"], "nothing but white space"),
    ],
)
def test_a_diagnosis_refuses(words, says, there, refused):
    Path("tiny.txt").write_text("a")
    Path("blank.txt").write_text(" \n")
    assert says in refused(cli.main(["diagnose", "--run", "slim", *words]))


def test_a_text_too_short_to_judge_on_is_refused(there, refused):
    Path("tiny.txt").write_text("a")
    arguments = ["--text", "tiny.txt", "--max-characters", "60"]
    assert "take a longer text" in refused(cli.main(["judge", "--run", "slim", *arguments]))


def test_an_export_is_exported_again_as_it_is(there, capsys):
    assert cli.main(["export", "--run", "slim", "--to", "again", "--licence", "CC0-1.0"]) == 0
    for name in ("data.json", "evaluation.json", "prior/config.yaml", "prior/environment.json"):
        assert Path("again", name).read_bytes() == Path("slim", name).read_bytes()
    assert "from_pretrained" in capsys.readouterr().out


def test_what_is_missing_is_said(there, capsys):
    Path("slim/evaluation.json").unlink()
    Path("slim/data.json").unlink()
    says = "its text is not counted in data.json: data.path=text.txt: no such file or folder$"
    with pytest.warns(TextNote, match=says):
        assert cli.main(["export", "--run", "slim", "--to", "bare"]) == 0
    out = capsys.readouterr().out
    assert "no scores: slim/evaluation.json is not there; --measure measures it now" in out
    assert "no licence: --licence says" in out
    card = Path("bare/README.md").read_text()
    assert "license: unknown" in card and "Not measured when this was shared" in card
    assert "not counted" in card and "Not said by those who shared it" in card
    data = json.loads(Path("bare/data.json").read_text())
    assert set(data["splits"]) == {"train"} and set(data["splits"]["train"]) == {"fingerprint"}


def test_a_run_without_scores_is_measured_when_asked(trained_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_run, "runs/small")
    monkeypatch.setattr(sharing, "evaluate_run", partial(evaluate_run, draws=2, prompts=0))
    assert cli.main(["export", "--run", "runs/small", "--to", "full", "--measure"]) == 0
    assert "measuring runs/small on its test text" in capsys.readouterr().out
    assert json.loads(Path("full/evaluation.json").read_text())["bits_per_character"]["bound"] > 0
    assert "Not measured" not in Path("full/README.md").read_text()
    assert not Path("runs/small/evaluation.json").exists()


def test_scores_of_other_weights_or_none_at_all_are_refused(there, refused):
    path = Path("slim/evaluation.json")
    scores = json.loads(path.read_text())
    path.write_text(json.dumps({**scores, "model": "0" * 64}))
    assert "is of other weights" in refused(cli.main(["export", "--run", "slim", "--to", "x"]))
    path.write_text("[]")
    assert "is no evaluation" in refused(cli.main(["export", "--run", "slim", "--to", "x"]))
    assert not Path("x").exists()


def test_export_refuses(there, refused):
    assert "is there already" in refused(cli.main(["export", "--run", "slim", "--to", "slim"]))
    assert "is no folder here" in refused(cli.main(["export", "--run", "nowhere", "--to", "x"]))
    assert "no finished run" in refused(cli.main(["export", "--run", "slim/pipeline", "--to", "x"]))
    Path("taken").touch()
    assert "taken is no folder" in refused(cli.main(["export", "--run", "slim", "--to", "taken/new/x"]))


def test_export_makes_the_folders_above(there, trained_run):
    assert cli.main(["export", "--run", str(trained_run), "--to", "no/such/folder"]) == 0
    assert Path("no/such/folder/README.md").is_file() and Path("no/such").is_dir()


def test_a_path_says_nothing_of_its_machine():
    names = {
        "texts/a.txt": "texts/a.txt",
        "/home/me/a.txt": "a.txt",
        "~/texts": "texts",
        "../b/*.txt": "*.txt",
    }
    assert {path: public_name(path) for path in names} == names
    assert without_places("data:\n  path: /a/b.txt\n  lanes: 4\n") == "data:\n  path: b.txt\n  lanes: 4\n"
    assert without_places("data: {dataset: owner/name}\n") == "data: {dataset: owner/name}\n"
