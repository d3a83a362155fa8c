"""`hldm train`: a text to a trained model in one command; and stage two reads what stage one read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMALL

from hldm import cli
from hldm.commands.train import _validated, with_limits
from hldm.config import changed, load_config, stage_training, to_dict
from hldm.runs.exits import Interrupted
from hldm.runs.folder import read_totals
from hldm.sources.corpora import load_corpora
from hldm.sources.notes import TextNote
from hldm.training import stages
from hldm.training.stage import plan
from hldm.training.twin import made, numbers, twin_of

TINY = ROOT / "configs/tiny.yaml"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lean_file() -> str:
    """A config that says all but which text is read."""
    settings = dict(setting.split("=") for setting in SMALL)
    settings |= {"training.autoencoder.steps": "4", "training.prior.steps": "8"}
    Path("lean.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return "lean.yaml"


@pytest.fixture
def own_text(corpus_path) -> list[str]:
    """A text of one's own, as it is typed."""
    shutil.copyfile(corpus_path, "own.txt")
    return ["data.path=own.txt", 'data.separator="\\n\\n"']


def settings_of(stage: str) -> dict:
    return yaml.safe_load(Path(f"runs/{stage}/config.yaml").read_text())


# ---- one command


def test_a_text_becomes_a_model_and_its_twin_and_the_next_command_writes(
    lean_file, own_text, capsys, recwarn
):
    with Path("own.txt").open("a") as file:  # the same in all splits
        file.write("\n\n".join(["", *["Let us go up to the town and make war on it."] * 20]))
    assert cli.main(["train", "--config", lean_file, "--name", "mine", "--twin", *own_text]) == 0
    out = capsys.readouterr().out
    (note,) = (str(warning.message) for warning in recwarn if warning.category is TextNote)
    assert note.startswith("own.txt: the same documents in several splits")  # though each stage reads it
    assert out.index("text: own.txt, ") < out.index("stage 1 of 3") and out.count("text: own.txt, ") == 1
    for command in ("score --run runs/mine --prompt ", "export --run runs/mine --to mine-to-share\n"):
        assert f"\n      hldm {command}" in out
    for number, stage in enumerate(("mine/autoencoder", "mine/prior", "mine-twin/autoencoder"), start=1):
        assert f"stage {number} of 3: runs/{stage}, " in out
        assert settings_of(stage)["data"]["path"] == "own.txt"
    assert read_totals(Path("runs/mine-twin/autoencoder")).steps == 12  # as long as both stages
    words = re.search(r"Next: hldm (generate --run runs/mine --prompt '[^']+')\n", out)
    assert words is not None
    text = load_corpora(load_config(lean_file, own_text).data)["validation"].text.tobytes().decode()
    prompt = words[1].split("'")[1]
    assert " ".join(text.split()).startswith(prompt) and prompt
    assert cli.main([*words[1].split("'")[0].split(), prompt, "--max-chars", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"]


def test_what_is_trained_is_not_trained_again_and_what_has_begun_takes_a_word(
    lean_file, own_text, monkeypatch, capsys, refused
):
    words = ["train", "--config", lean_file, "--name", "mine", *own_text]
    begun = []
    with monkeypatch.context() as patch:

        def stop(config, **options):
            begun.append(config.name)
            original(stage_training(config, "prior", steps=7), **options)
            shutil.rmtree("runs/mine/pipeline")
            Path("runs/mine/prior/totals.json").unlink()
            raise Interrupted(15, "runs/mine/prior")

        original = stages.train_diffusion
        patch.setattr(stages, "train_diffusion", stop)
        assert cli.main(words) == 128 + 15
    assert begun == ["mine"]
    before = Path("runs/mine/autoencoder/model").stat().st_mtime_ns
    capsys.readouterr()
    assert "runs/mine/prior has a checkpoint at step 7; pass --resume" in refused(cli.main(words))
    # the text is that of what has begun, and the name of the config says nothing of it
    assert cli.main(["train", "--config", lean_file, "--name", "mine", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "as in runs/mine/autoencoder: data.path=" in out and "reusing runs/mine/autoencoder" in out
    assert "resuming runs/mine/prior at step 7" in out and read_totals(Path("runs/mine/prior")).steps == 8
    assert Path("runs/mine/autoencoder/model").stat().st_mtime_ns == before
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("reusing ") == 2
    Path("lean-twin.yaml").write_text("base: lean.yaml\nautoencoder.latent_dim: 0\n")
    resumed = ["train", "--config", lean_file, "--name", "mine", "--resume", "--twin"]
    assert cli.main(resumed) == 0  # the twin reads that text, too
    assert settings_of("mine-twin/autoencoder")["data"]["path"] == "own.txt"


def test_what_cannot_be_trained_is_refused_before_anything_is(lean_file, own_text, refused):
    train = ["train", "--config", lean_file, *own_text]
    assert "this config is a twin itself" in refused(cli.main([*train, "--twin", "autoencoder.latent_dim=0"]))
    assert "training.prior needs about" in refused(cli.main([*train, "prior.width=65536", "prior.layers=99"]))
    Path("lean-twin.yaml").write_text("base: lean.yaml\nautoencoder.latent_dim: 0\ndata.held_out: 0.4\n")
    assert "both must read the same text" in refused(cli.main([*train, "--twin"]))
    assert "nowhere.txt: no such file" in refused(cli.main([*train, "data.path=nowhere.txt"]))
    assert not Path("runs").exists()


def test_minutes_are_shared_as_the_config_says_and_steps_are_of_each_stage():
    tiny = load_config(TINY)  # 2.7 and 0.5 minutes
    short = with_limits(tiny, 6.4, None, None).training
    assert (short.autoencoder.minutes, short.prior.minutes) == pytest.approx((5.4, 1.0))
    none = changed(
        tiny,
        training=changed(tiny.training, prior=changed(tiny.training.prior, minutes=0.0)),
    )
    assert with_limits(none, 10, None, None).training.prior.minutes == pytest.approx(1.0)
    counted = with_limits(tiny, None, 70, 9).training
    assert (counted.autoencoder.steps, counted.autoencoder.minutes) == (70, 0)
    assert (counted.prior.steps, counted.prior.minutes) == (9, 0)
    both = with_limits(tiny, 1, 70, None).training.prior
    assert both.steps == 70 and both.minutes == pytest.approx(0.5 / 3.2)
    twin = load_config(ROOT / "configs/tiny-twin.yaml")
    assert with_limits(twin, 4, None, None).training.autoencoder.minutes == 4
    assert with_limits(tiny, None, None, None) == tiny


def test_the_stages_of_runs_are_counted_and_the_minutes_to_come():
    model, twin = load_config(TINY), load_config(ROOT / "configs/tiny-twin.yaml")
    parts = plan(model, twin)
    assert [str(part) for part in parts] == [f"stage {number} of 3" for number in (1, 2, 3)]
    assert [part.later_minutes for part in parts] == pytest.approx([3.7, 3.2, 0])
    unlimited = stage_training(model, "prior", minutes=0.0)
    assert [part.later_minutes for part in plan(unlimited)] == [None, 0]


# ---- the twin


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_a_twin_that_no_file_describes_has_its_models_size(name):
    model = load_config(ROOT / f"configs/{name}.yaml")
    twin = made(model)
    wanted = numbers(model, "autoencoder") + numbers(model, "prior")
    assert twin.is_twin and twin.autoencoder.carry_state and twin.data == model.data
    assert numbers(twin, "autoencoder") == pytest.approx(wanted, rel=0.05)


def test_a_twin_takes_text_and_time_of_the_command_line_and_its_shape_from_its_file():
    given = ["data.lanes=8", "autoencoder.latent_dim=6", "chunking.strategy=entropy", "seed=3"]
    model = with_limits(changed(load_config(TINY, given), name="mine"), 1.0, None, None)
    twin = twin_of(model, TINY, given)
    assert (twin.name, twin.data, twin.seed) == ("mine-twin", model.data, 3)
    assert twin.training.autoencoder.minutes == pytest.approx(1.0)
    shipped = load_config(ROOT / "configs/tiny-twin.yaml")
    assert (twin.autoencoder, twin.chunking) == (shipped.autoencoder, shipped.chunking)
    assert twin_of(model, Path("tiny"), given) == twin  # by the name of what comes with hldm, anywhere


# ---- stage two and the text of stage one


def test_stage_two_inherits_the_text_of_stage_one_and_says_so(lean_file, own_text, capsys):
    words = ["--config", lean_file, "--name", "mine"]
    assert cli.train_autoencoder([*words, *own_text, "seed=5"]) == 0
    capsys.readouterr()
    assert cli.train_diffusion([*words, "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["path"] == "own.txt"
    assert cli.train_diffusion([*words, "logging.sample_every=6"]) == 0
    said = 'as in runs/mine/autoencoder: seed=5, data.path="own.txt", data.separator="\\n\\n"\n'
    assert capsys.readouterr().out.startswith(said)
    first, second = settings_of("mine/autoencoder"), settings_of("mine/prior")
    assert (first["logging"].pop("sample_every"), second["logging"].pop("sample_every")) == (1000, 6)
    assert first == second
    totals = [read_totals(Path("runs/mine") / stage) for stage in ("autoencoder", "prior")]
    assert totals[0].corpus == totals[1].corpus


def test_stage_two_takes_a_text_that_has_moved_and_no_other(lean_file, own_text, refused, corpus_path):
    words = ["--config", lean_file, "--name", "mine"]
    assert cli.train_autoencoder([*words, *own_text]) == 0
    Path("own.txt").rename("moved.txt")
    Path("other.txt").write_text(corpus_path.read_text().upper())
    error = refused(cli.train_diffusion([*words, "data.path=other.txt"]))
    assert "runs/mine/autoencoder was started with other settings (data.path own.txt -> other.txt)" in error
    assert not Path("runs/mine/prior").exists()
    assert cli.train_diffusion([*words, "data.path=moved.txt"]) == 0
    Path("other.txt").rename("own.txt")  # the same setting, another text
    shutil.rmtree("runs/mine/prior")
    assert "fingerprint" in refused(cli.train_diffusion(words))


def test_a_config_over_a_runs_settings_keeps_its_own_name_and_values(lean_file):
    config = load_config(lean_file, ["seed=9", "data.path=x.txt"])
    Path("before.yaml").write_text(yaml.safe_dump(to_dict(changed(config, name="before"))))
    found = load_config(lean_file, ["seed=2"], inherited=["before.yaml"])
    assert (found.name, found.seed, found.data.path) == ("lean", 2, "x.txt")


def test_stage_two_does_not_take_code_from_a_folder(lean_file, own_text, refused):
    words = ["--config", lean_file, "--name", "mine"]
    assert cli.train_autoencoder([*words, *own_text]) == 0
    saved = Path("runs/mine/autoencoder/config.yaml")
    Path("evil.py").write_text("open('ran', 'w')\n")
    for key in ("chunking.strategy", "prior.denoiser", "prior.plugin"):
        section, name = key.split(".")
        settings = settings_of("mine/autoencoder")
        before = saved.read_bytes()
        settings[section][name] = "evil:Part"
        saved.write_text(yaml.safe_dump(settings))
        assert f"give {key}=evil:Part again" in refused(cli.train_diffusion(words))
        saved.write_bytes(before)
    assert not Path("ran").exists() and not Path("runs/mine/prior").exists()


# ---- several processes


@pytest.mark.slow
def test_several_processes_train_both_stages_in_one_launch(lean_file, own_text):
    command = ["--config_file", str(ROOT / "configs/accelerate/two_processes.yaml")]
    port = ["--main_process_port", str(29_500 + os.getpid() % 1000)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *command, *port, "-m", "hldm", "train"]
    done = subprocess.run(
        [*launch, "--config", lean_file, "--name", "two", *own_text],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    assert done.stdout.count("2 processes on cpu") == 2 and done.stdout.count("Next: ") == 1
    assert json.loads(Path("runs/two/prior/totals.json").read_text())["steps"] == 8


@pytest.mark.parametrize(("last", "helped"), [(2.684, False), (2.668, True), (2.5, True)])
def test_a_second_stage_that_made_the_model_worse_is_said_to(tmp_path, last, helped):
    (tmp_path / "prior").mkdir()
    rest = {"event": "validation", "validation_latent": 0.8, "validation_decoder": 1.8, "validation_end": 0.0}
    lines = [{**rest, "validation_bound": bits} for bits in (2.665, last)]
    (tmp_path / "prior/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = _validated(tmp_path)
    assert told.startswith(f"{last:.3f} bits a character of validation text")
    assert ("began at 2.665, so its training did not help" in told) != helped
