"""Bad input ends in one line on standard error and exit code 2, never in a traceback, and loses nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from conftest import ROOT, truncate

import hldm
from hldm import cli
from hldm.runs.checkpoints import newest_checkpoint
from hldm.runs.exits import Interrupted
from hldm.runs.ranks import RankLost
from hldm.training import stages
from hldm.training.anomalies import TrainingDiverged

SCRIPTS = ("train_autoencoder.py", "train_diffusion.py", "generate.py")
COMMANDS = typer.main.get_command(cli.app).commands
TINY = str(ROOT / "configs/tiny.yaml")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- what costs no torch


@pytest.mark.parametrize(
    ("start", "name"),
    [
        *((f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')", script) for script in SCRIPTS),
        ("runpy.run_module('hldm.evaluation', run_name='__main__')", "python -m hldm.evaluation"),
        ("runpy.run_module('hldm', run_name='__main__')", "hldm"),
    ],
)
def test_help_is_quick_imports_no_torch_and_calls_the_command_by_its_name(start, name):
    code = (
        "import runpy, sys, time\n"
        "sys.argv = ['x', '--help']\n"
        f"try:\n    {start}\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules, time.process_time())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    code, has_torch, seconds = done.stdout.splitlines()[-1].split()
    assert done.stdout.startswith(f"Usage: {name} [OPTIONS]")
    assert (code, has_torch) == ("0", "False") and float(seconds) < 2  # half of that where nothing else runs


def test_help_of_every_command_imports_no_torch():
    code = (
        "import sys; from hldm.cli import main\n"
        "print(*(main([name, '-h']) for name in sys.argv[1:]), 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code, *COMMANDS]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage: hldm ") == len(COMMANDS) >= 19
    assert done.stdout.splitlines()[-1] == "0 " * len(COMMANDS) + "False"


def test_alone_it_prints_its_help_and_the_version_when_asked(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("Usage: hldm [OPTIONS] COMMAND")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hldm {hldm.__version__}\n"


def test_a_shell_can_complete_commands_and_options():
    for typed, meant in (("hldm ch", "chunkers\nchunk\n"), ("hldm generate --sch", "--scheduler\n")):
        shell = {"_HLDM_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        words = [sys.executable, "-m", "hldm"]
        assert subprocess.check_output(words, env={**os.environ, **shell}, cwd=ROOT, text=True) == meant


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "No such command 'trian'"),
        (["generate", "--sede", "1"], "No such option: --sede (Possible options: "),
        (["chunk"], "Missing option '--text'"),
        (["demo", "--config", TINY, "now"], "expected key=value, such as seed=1, got 'now'"),
        (["generate", "--scheduler", "ode"], "'ode' is not one of 'ancestral', 'ddim'"),
        (["judge", "--run", "x", "--prompts", "many"], "Invalid value for '--prompts'"),
        (["judge", "--run", "x", "--seed", "-1"], "'--seed': must lie in 0..2^31-1, got -1"),
        (["rate-curve", "--config", "x", "--minutes", "inf"], "must be positive and finite, got inf"),
        (["train-autoencoder", "--config"], "Option '--config' requires an argument"),
    ],
)
def test_what_cannot_be_parsed_is_refused_in_one_line(arguments, says, refused):
    assert says in refused(cli.main(arguments))


def test_the_resolved_config_can_be_printed_and_read_back(config_file, capsys):
    arguments = ["--config", config_file, "--print-config", "training.prior.learning_rate=1e-3"]
    assert cli.train_diffusion([*arguments, "--steps", "7", "--name", "other"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    config = stages_config("printed.yaml")
    assert (config.training.prior.learning_rate, config.training.prior.steps) == (1e-3, 7)
    assert config.name == "other" and config.training.autoencoder.steps == 12
    assert not Path("runs").exists()


def stages_config(path: str):
    from hldm.config import load_config

    return load_config([path])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data.path=nowhere.txt"], "nowhere.txt: no such file"),
        (["data.path=empty.txt"], "empty.txt"),
        (["data.path=image.png"], "must end in .txt"),
        (["data.dataset=some/where"], "exclude each other"),
        (["data.lane=4"], "unknown key 'data.lane'; the nearest known is 'data.lanes'"),
        (["data.lanes=four"], "data.lanes"),
        (["data.lanes=0"], "data.lanes must be greater than 0"),
        (["data.lanes=1.5"], "data.lanes"),
        (["lanes"], "expected key=value"),
        (
            ["autoencoder.encoder.width=18"],
            "autoencoder.encoder.width must be divisible by 4 times the heads, got 18",
        ),
        (["prior.width=30"], "prior.width must be divisible by"),
        (["training.autoencoder.learning_rate=nan"], "learning_rate"),
        (["training.accumulation=3"], "divisible by processes x accumulation"),
        (["logging.trackers=[tensorbored]"], "tensorbored"),
        (["--steps", "0"], "training.autoencoder.steps must be greater than 0, got 0"),
        (["--minutes", "0"], "'--minutes': must be positive and finite, got 0"),
        (["--minutes", "nan"], "must be positive and finite, got nan"),
        (["--minutes", "inf"], "must be positive and finite, got inf"),
        (["--name", "../elsewhere"], "name must be a folder name"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "broken.yaml"], "broken.yaml:1:"),
    ],
)
def test_training_refuses(arguments, says, config_file, refused):
    Path("empty.txt").touch()
    Path("image.png").touch()
    Path("broken.yaml").write_text("data: {lanes: 4")
    assert says in refused(cli.train_autoencoder(["--config", config_file, *arguments]))


@pytest.mark.parametrize("wrong", ["data.path=nowhere.txt", "data.path=empty.txt"])
def test_a_mistake_in_the_path_does_not_use_up_the_name(wrong, config_file, refused):
    Path("empty.txt").touch()
    refused(cli.train_autoencoder(["--config", config_file, wrong]))
    assert cli.train_autoencoder(["--config", config_file, "--steps", "1"]) == 0


# --- runs that are there already


def test_a_finished_run_is_not_trained_over(run_copy, config_file, refused):
    before = contents(run_copy)
    for train in (cli.train_autoencoder, cli.train_diffusion):
        assert "has a checkpoint at step 12; pass --resume" in refused(train(["--config", config_file]))
    assert contents(run_copy) == before


def test_a_run_is_not_resumed_with_other_settings(run_copy, config_file, refused):
    before = contents(run_copy)
    error = refused(cli.train_autoencoder(["--config", config_file, "--resume", "data.lanes=8"]))
    assert "data.lanes 4 -> 8" in error
    assert contents(run_copy) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# the save that replaces the damaged checkpoint says so by a warning
@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_a_truncated_checkpoint_is_said_and_the_one_before_it_continued_to_the_same_weights(
    stage, run_copy, config_file, trained_run, capsys
):
    truncate(run_copy / stage / "checkpoints/step-000000012/model.safetensors")
    train = cli.train_autoencoder if stage == "autoencoder" else cli.train_diffusion
    assert train(["--config", config_file, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "model.safetensors is damaged" in said and "falling back" in said and "at step 9" in said
    saved = [newest_checkpoint(run / stage) for run in (trained_run, run_copy)]
    assert saved[0] is not None and saved[1] is not None and saved[1].step == 12
    torch.testing.assert_close(saved[0].tensors, saved[1].tensors, rtol=0, atol=0)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(run_copy, config_file, refused):
    for path in (run_copy / "autoencoder/checkpoints").glob("*/model.safetensors"):
        truncate(path)
    before = contents(run_copy / "autoencoder/checkpoints")
    error = refused(cli.train_autoencoder(["--config", config_file, "--resume"]))
    assert "no valid checkpoint left; choose another --name" in error
    assert contents(run_copy / "autoencoder/checkpoints") == before


# --- stage two


def test_stage_two_names_the_command_of_stage_one(config_file, refused):
    assert "run hldm train-autoencoder with the same" in refused(
        cli.train_diffusion(["--config", config_file])
    )
    assert not Path("runs").exists()


def test_stage_two_refuses_a_twin(refused):
    error = refused(cli.train_diffusion(["--config", str(ROOT / "configs/tiny-twin.yaml")]))
    assert "the twin has no latents and so no second stage" in error


def test_stage_two_refuses_an_autoencoder_of_another_config(run_copy, config_file, refused):
    error = refused(cli.train_diffusion(["--config", config_file, "autoencoder.latent_dim=8"]))
    assert "was started with other settings (autoencoder.latent_dim 4 -> 8); set them back" in error


def test_stage_two_refuses_a_damaged_autoencoder(run_copy, config_file, refused):
    shutil.rmtree(run_copy / "prior")
    truncate(run_copy / "autoencoder/model" / WEIGHTS)
    assert "autoencoder/model" in refused(cli.train_diffusion(["--config", config_file]))


# --- how a run ends


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (Interrupted(signal.SIGTERM, "runs/a"), 128 + signal.SIGTERM, "go on with --resume"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (stages.ConfigError("one\n  two"), 2, "one two"),
        (PermissionError(13, "Permission denied", "runs"), 2, "runs: Permission denied"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "lower data.lanes"),
        (MemoryError(), 4, "out of memory"),
        (TrainingDiverged("4 steps in a row"), 3, "4 steps in a row"),
        (RankLost("rank 1 of 2 has died or hangs"), 5, "rank 1 of 2"),
    ],
)
def test_what_users_can_mend_is_one_line(error, code, says, capsys):
    def work() -> int:
        raise error

    assert cli.guarded(work) == code
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_slip_of_ours_keeps_its_traceback():
    def work() -> int:
        raise RuntimeError("shapes disagree")

    with pytest.raises(RuntimeError, match="shapes disagree"):
        cli.guarded(work)


# --- what is printed and tracked


def test_a_training_goes_on_when_nobody_reads_its_output_any_more(config_file, without_reader, capsys):
    with without_reader():
        assert cli.train_autoencoder(["--config", config_file, "--name", "unread"]) == 0
    assert capsys.readouterr().err == ""
    assert Path("runs/unread/autoencoder/totals.json").is_file()


@pytest.mark.slow
def test_a_training_outlives_head(config_file):
    command = (
        f"{sys.executable} {ROOT / 'train_autoencoder.py'} --config {config_file} --name piped | head -n 1"
    )
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    assert Path("runs/piped/autoencoder/totals.json").is_file()


def test_tensorboard_gets_its_events(config_file):
    pytest.importorskip("tensorboard")
    arguments = ["--config", config_file, "--steps", "2", "logging.trackers=[tensorboard]"]
    assert cli.train_autoencoder(arguments) == 0
    events = list(Path("runs").rglob("events.out.tfevents*"))
    assert events and all(path.stat().st_size for path in events)
