"""The code of a class that a setting names runs where someone asked for it, and nowhere else."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

from hldm import plugins
from hldm.chunking.chunker import make_chunker
from hldm.cli import main
from hldm.config import ChunkingConfig, ConfigError, load_config
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.model.autoencoder import Autoencoder
from hldm.runs.saved_model import require_consent_of

NUMBERS = itertools.count()
CANARY = Path("canary")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    monkeypatch.setattr(plugins, "_allowed", set())


@pytest.fixture
def module() -> str:
    """A module in the working directory that leaves a file behind when it is imported."""
    name = f"someones_{next(NUMBERS)}"
    Path(f"{name}.py").write_text(
        f"open({CANARY.name!r}, 'w').close()\nimport numpy as np\nclass Mine:\n"
        "    def __init__(self, min_bytes, max_bytes): ...\n"
        "    def borders(self, text): return np.zeros(len(text), bool)\n"
    )
    return name


@pytest.fixture
def folder(saved_pipeline, module) -> Path:
    """A saved model whose text is cut by that module's class."""
    found = Path(shutil.copytree(saved_pipeline, "shared"))
    path = found / "autoencoder" / "config.json"
    saved = json.loads(path.read_text())
    saved["chunking"]["strategy"] = f"{module}:Mine"
    path.write_text(json.dumps(saved))
    return found


@pytest.mark.parametrize("load", [read_pipeline, HLDMPipeline.from_pretrained])
def test_a_folder_runs_no_code_unasked(load, folder, module):
    with pytest.raises(ConfigError) as error:
        load(folder)
    said = str(error.value)
    assert said.startswith(f"shared asks for code of its own, {module}:Mine, which is not run unasked")
    assert "--allow-code" in said and "allow_code=True" in said and f"{plugins.VARIABLE}=1" in said
    with pytest.raises(ConfigError, match="not run unasked"):
        Autoencoder.from_pretrained(folder / "autoencoder")
    assert not CANARY.exists()


def test_with_the_flag_it_does(folder):
    pipeline = read_pipeline(folder, allow_code=True)
    assert CANARY.exists()
    assert [span for span in pipeline("abc", max_characters=5).chunk_spans]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--run", "shared", "--prompt", "a", "--max-chars", "3", "--json"],
        ["chunk", "--run", "run", "--text", "text"],
        ["evaluate", "--run", "run"],
        ["diagnose", "--run", "run"],
        ["judge", "--run", "run"],
    ],
)
def test_a_command_takes_the_flag_for_itself_alone(command, folder, module, capsys):
    Path("text").write_text("some text")
    stage = Path("run/autoencoder")
    stage.mkdir(parents=True)
    (stage / "config.yaml").write_text(f"chunking: {{strategy: '{module}:Mine'}}\ndata: {{path: nowhere}}")
    folder = Path(shutil.copytree(folder, "run/pipeline"))
    assert main(command) == 2
    assert f"{module}:Mine" in capsys.readouterr().err and not CANARY.exists()
    main([*command, "--allow-code"])  # whatever else a run needs
    assert CANARY.exists() and "not run unasked" not in capsys.readouterr().err
    assert plugins.ALL not in plugins._allowed


def test_a_variable_asks_where_a_launcher_starts_the_process(folder, monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, "1")
    read_pipeline(folder)
    assert CANARY.exists()


def test_a_config_is_read_without_its_code(module):
    config = load_config([], [f"chunking.strategy={module}:Mine"])
    assert config.chunking.strategy == f"{module}:Mine" and not CANARY.exists()
    with pytest.raises(ConfigError, match="is code of its own"):
        make_chunker(config.chunking)
    plugins.allow_named(config)
    assert not CANARY.exists()
    make_chunker(config.chunking)
    assert CANARY.exists()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("nowhere_at_all:Mine", None, "no module nowhere_at_all on sys.path or in"),
        ("own_without:Mine", "x = 1\n", r"own_without.py has no class Mine"),
        ("own_value:Mine", "Mine = 1\n", r"own_value.py has no class Mine"),
        (
            "own_needs:Mine",
            "import nowhere_at_all\n",
            "own_needs needs nowhere_at_all, which is not installed",
        ),
        ("own_broken:Mine", "x = (\n", r"importing own_broken failed with SyntaxError"),
        (
            "own_raises:Mine",
            "raise OSError('no disk')\n",
            r"failed with OSError: no disk \(.*own_raises.py, line 1\)",
        ),
        ("own_pack.inner:Mine", None, "no module own_pack.inner"),
    ],
)
def test_what_is_not_there_or_fails_is_said_in_one_line(name, text, says):
    if text is not None:
        Path(f"{name.partition(':')[0]}.py").write_text(text)
    plugins.allow([name])
    with pytest.raises(ConfigError, match=says) as error:
        make_chunker(ChunkingConfig(strategy=name))
    assert "\n" not in str(error.value) and f"chunking.strategy={name}: " in str(error.value)


@pytest.mark.parametrize("value", ["a b:C", "os.system", "m:", ":C", "m:C:D", "../m:C", "m:C()", "1m:C"])
def test_what_names_no_class_is_refused_as_a_setting(value):
    with pytest.raises(ConfigError, match="chunking.strategy must be one of fixed, words.*module:Class, got"):
        load_config([], [f"chunking.strategy='{value}'"])


def test_a_damaged_config_names_nothing(tmp_path):
    (tmp_path / "config.json").write_text('{"chunking": 3, "prior": {"denoiser": ["a:B"]}')
    require_consent_of(tmp_path)
    (tmp_path / "config.json").write_text('{"chunking": 3, "prior": {"denoiser": ["a:B"]}}')
    require_consent_of(tmp_path)
    (tmp_path / "config.json").write_text('{"prior": {"denoiser": "a:B", "plugin": "c:D"}}')
    with pytest.raises(ConfigError, match="a:B"):
        require_consent_of(tmp_path)
