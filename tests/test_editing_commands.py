"""`hldm fill`, `edit`, `interpolate` and `steer` print what the pipeline gives, and refuse in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hldm import cli
from hldm.config import changed
from hldm.generation.pipeline import HLDMPipeline
from hldm.generation.steer import Guide, shapes
from hldm.runs.files import fingerprint
from hldm.text.bytes import END_OF_DOCUMENT


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pipe(saved_pipeline, tmp_path_factory) -> HLDMPipeline:
    """The saved pipeline, but endless; and where it is."""
    pipe = HLDMPipeline.from_pretrained(saved_pipeline)
    pipe.autoencoder.outputs.bias.data[END_OF_DOCUMENT] = -1e9
    pipe.prior.register_to_config(autoencoder=fingerprint(pipe.autoencoder.state_dict()))
    folder = tmp_path_factory.mktemp("endless") / "pipeline"
    pipe.save_pretrained(folder)
    pipe.folder = str(folder)
    return pipe


@pytest.fixture
def guide(pipe) -> Path:
    tensors = {name: torch.ones(shape) for name, shape in shapes(pipe.autoencoder, pipe.prior, 2).items()}
    model = fingerprint(pipe.autoencoder.state_dict())
    Guide("mood", ("bad", "good"), model, tensors, {}).save(Path("mood.steer"))
    return Path("mood.steer")


def said(capsys, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_fill_prints_the_best_and_as_json_all(pipe, capsys):
    arguments = ["fill", "--run", pipe.folder, "--left", "And he", "--right", " went", "--candidates", "3"]
    found = json.loads(said(capsys, *arguments, "--chunks", "2", "--seed", "4", "--json"))
    given = pipe.fill("And he", " went", chunks=2, candidates=3, seed=4)
    assert found["candidates"] == [each.as_dict() for each in given]
    assert found["text"] == given[0].text.decode("utf-8", "replace")
    shown = said(capsys, *arguments, "--characters", "6", "--show-candidates")
    assert shown.startswith("And he|") and "| went\n" in shown and shown.count("\n") == 2 + 2 + 3


def test_edit_numbers_chunks_and_writes_some_anew(pipe, capsys):
    arguments = ["edit", "--run", pipe.folder, "--text", "And he went up"]
    chunks = json.loads(said(capsys, *arguments, "--json"))["chunks"]
    assert "".join(chunks) == "And he went up" and said(capsys, *arguments).startswith(f"1[{chunks[0]}] 2[")
    cold = ["--temperature", "0", "--decoder-temperature", "0", "--hold-latents", "--candidates", "2"]
    found = json.loads(said(capsys, *arguments, "--redraw", f"1-{len(chunks)}", *cold, "--json"))
    settings = changed(pipe.settings, temperature=0.0, decoder_temperature=0.0)
    options = dict(hold_latents=True, candidates=2, settings=settings)
    given = pipe.edit("And he went up", (1, len(chunks)), **options)
    assert found["text"] == given.text.decode("utf-8", "replace") and found["before"] == chunks
    assert found["redrawn"] == [1, len(chunks)]
    shown = said(capsys, *arguments, "--redraw", "2", "--show-candidates", "--candidates", "2")
    assert shown.splitlines()[0].startswith("1[") and "bits of the right" in shown


def test_interpolate_prints_a_line_a_weight(pipe, capsys):
    arguments = [
        "interpolate",
        "--run",
        pipe.folder,
        "--from",
        "And he went",
        "--to",
        "They came",
        "--steps",
        "3",
    ]
    lines = said(capsys, *arguments).splitlines()
    assert [line[:5] for line in lines] == ["0.00 ", "0.50 ", "1.00 "]
    found = json.loads(said(capsys, *arguments, "--path", "spherical", "--json"))["steps"]
    given = pipe.interpolate("And he went", "They came", steps=3, path="spherical")
    assert [step["text"] for step in found] == [step.text.decode("utf-8", "replace") for step in given]


def test_a_fitted_guide_says_what_it_is_right_of_and_the_command_to_try(pipe, monkeypatch, capsys):
    fitted = Guide("speech", ("none", "speech"), "model", {}, {"after": 0.9, "next": 0.8})
    monkeypatch.setattr("hldm.studies.steering.read_ground", lambda folder, characters: None)
    monkeypatch.setattr("hldm.studies.steering.fit", lambda ground, attribute, seed: fitted)
    monkeypatch.setattr(Guide, "save", lambda self, path: None)
    out = said(capsys, "steer", "fit", "--run", pipe.folder, "--attribute", "speech", "--to", "a b.steer")
    assert (
        "50.0% by guessing): 90.0% of passages, once they are read (method particles), 80.0% of chunks" in out
    )
    written = f"Next: hldm steer write --run {pipe.folder} --guide 'a b.steer' --to speech"
    assert out.splitlines()[-1] == written


def test_steer_writes_toward_a_value_and_at_strength_0_what_generate_writes(pipe, guide, capsys):
    arguments = ["--run", pipe.folder, "--prompt", "And he", "--max-characters", "30", "--seed", "2"]
    plain = said(capsys, "generate", *arguments, "--json")
    steer = ["steer", "write", *arguments, "--guide", str(guide), "--to", "good", "--json"]
    found = json.loads(said(capsys, *steer, "--strength", "0"))
    assert found["text"] == json.loads(plain)["text"]
    steered = json.loads(said(capsys, *steer, "--strength", "3", "--method", "particles", "--particles", "3"))
    options = dict(strength=3.0, method="particles", particles=3, max_characters=30, seed=2)
    (given,) = pipe.steer("And he", guide, "good", **options)
    assert steered["text"] == given.text.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fill", "--left", "a"], "give --right"),
        (["fill"], "give --right"),
        (["fill", "--right", "b", "--candidates", "10000"], "candidates must lie in 1..1,024, got 10,000"),
        (["fill", "--right", "b", "--chunks", "1", "--characters", "2"], "one of the two"),
        (["fill", "--right", "b", "--temperature", "nan"], "temperature"),
        (["fill", "--measure", "1", "--run", "small"], "2 places or more"),
        (["edit", "--text", ""], "is empty"),
        (["edit", "--text", "And he went", "--redraw", "two"], "--redraw takes FIRST-LAST"),
        (["edit", "--text", "And he went", "--redraw", "2-99"], "the text has chunks 1 to"),
        (["interpolate", "--from", "a"], "give both --from TEXT and --to TEXT"),
        (["interpolate", "--from", "a", "--to", "b", "--steps", "10000"], "steps must lie in 2..101"),
        (["steer", "write", "--guide", "mood.steer", "--to", "ugly"], "mood is one of bad, good, got 'ugly'"),
        (
            ["steer", "write", "--guide", "mood.steer", "--to", "good", "--strength", "nan"],
            "strength must lie in",
        ),
        (["steer", "write", "--guide", "none.steer", "--to", "good"], "none.steer: no such file"),
        (["steer", "write", "--guide", "text.txt", "--to", "good"], "is no steering classifier"),
        (["steer", "fit", "--attribute", "colour", "--to", "x"], "--attribute is one of genre"),
        (["steer", "fit", "--attribute", "genre", "--to", "no/x"], "no folder"),
        (["steer", "fit", "--attribute", "genre", "--to", "text.txt"], "is no steering classifier"),
        (["steer", "measure", "--guide", "none.steer"], "none.steer: no such file"),
        (["steer", "measure", "--guide", "mood.steer", "--strength", "nan"], "strength must lie in"),
    ],
)
def test_bad_input_ends_in_one_line(pipe, guide, refused, arguments, told):
    Path("text.txt").write_text("not mine")
    run = [] if "--run" in arguments or "fit" in arguments else ["--run", pipe.folder]
    assert told in refused(cli.main([*arguments, *run]))
    assert Path("text.txt").read_text() == "not mine"


def test_a_guide_of_another_model_is_refused(saved_pipeline, guide, refused):
    shutil.copytree(saved_pipeline, "other")
    arguments = ["steer", "write", "--run", "other", "--guide", str(guide), "--to", "good"]
    assert "fitted to another model's latents" in refused(cli.main(arguments))
