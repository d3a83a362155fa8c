"""Small runs that several tests share."""

from __future__ import annotations

import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hldm.config import Config, changed, load_config, to_yaml

if TYPE_CHECKING:
    from hldm.text.corpus import Corpus

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.stem.startswith("jepa-")]

# A model of some thousand parameters on a text of some thousand bytes: a step takes milliseconds.
SMALL = [
    "data.lanes=4",
    "data.window_bytes=64",
    "data.held_out=0.2",
    "autoencoder.latent_dim=4",
    "autoencoder.encoder.width=16",
    "autoencoder.encoder.blocks=[recurrent,attention]",
    "autoencoder.decoder.width=16",
    "autoencoder.decoder.blocks=[recurrent,attention]",
    "autoencoder.trunk_layers=1",
    "autoencoder.trunk_width=16",
    "autoencoder.components=16",
    # with sharp latents rounding grows tenfold faster from step to step, and runs are compared over many
    "diffusion.gamma_0=0",
    "prior.width=16",
    "prior.layers=1",
    "prior.denoiser_layers=1",
    "training.autoencoder.minutes=0",
    "training.prior.minutes=0",
    "training.autoencoder.steps=12",
    "training.prior.steps=12",
    "checkpoint.every=3",
    "logging.every=1",
    "generation.steps=2",
]


@contextmanager
def plain_only() -> Iterator[None]:
    """Plain formulas alone within, as without `hldm.kernels`."""
    from hldm.model import speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "_find_forms", lambda: False)
        yield


@contextmanager
def without_kernels() -> Iterator[None]:
    """No C++ within, as on a machine without a compiler: forms in torch remain."""
    from hldm.kernels import library

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "kernels", lambda: library.Kernels(None, "off"))
        yield


@contextmanager
def segmenters_of(**settings: Any) -> Iterator[None]:
    """Segmenters of another size and training within."""
    from hldm.chunking.recurrence import GateSegmenter
    from hldm.chunking.segmenter import Segmenter, Settings

    with pytest.MonkeyPatch.context() as patch:
        for cls in (Segmenter, GateSegmenter):
            patch.setattr(cls, "settings", Settings(**settings))
        yield


@pytest.fixture
def small_segmenters() -> Iterator[None]:
    """Segmenters that train in a blink."""
    with segmenters_of(width=16, layers=1, lanes=2, window_bytes=64, steps=5, minutes=math.inf):
        yield


@cache
def built_in_text() -> Corpus:
    """The validation split of the built-in text, which takes most of a second to read."""
    from hldm.config import DataConfig
    from hldm.sources.corpora import load_corpus

    return load_corpus(DataConfig(), "validation")


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty short documents of the built-in text."""
    text = built_in_text().text[:8000].tobytes().decode()
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(text[i : i + 400] for i in range(0, 8000, 400)))
    return path


@pytest.fixture
def small_overrides(corpus_path: Path) -> list[str]:
    """Overrides of configs/tiny.yaml that make it train in a second."""
    return [*SMALL, f"data.path={corpus_path}", 'data.separator="\\n\\n"']


@pytest.fixture
def small_config(small_overrides: list[str]) -> Config:
    """configs/tiny.yaml, much smaller."""
    return changed(load_config([ROOT / "configs/tiny.yaml"], small_overrides), name="small")


@pytest.fixture
def small_twin(small_overrides: list[str]) -> Config:
    """Its twin."""
    overrides = [o for o in small_overrides if "latent_dim" not in o]
    return changed(load_config([ROOT / "configs/tiny-twin.yaml"], overrides), name="small-twin")


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, corpus_path: Path) -> Path:
    """runs/small with both stages of `small_config` trained. Read only: copy it to change it."""
    from hldm.training.stages import train_autoencoder, train_diffusion

    overrides = [*SMALL, f"data.path={corpus_path}", 'data.separator="\\n\\n"']
    config = changed(load_config([ROOT / "configs/tiny.yaml"], overrides), name="small")
    root = tmp_path_factory.mktemp("trained") / "runs"
    train_autoencoder(config, root=root)
    return train_diffusion(config, root=root)


@pytest.fixture
def plain_torch() -> Callable[[], AbstractContextManager[None]]:
    """`with plain_torch():` as on a machine without a compiler; skips where that is all there is."""
    from hldm.kernels import library as kernels

    if kernels.library() is None:
        pytest.skip(f"C++ kernels: {kernels.kernels().told}")
    return without_kernels


@pytest.fixture
def config_file(small_config) -> str:
    """small.yaml in the current folder, which the test has changed to one of its own."""
    Path("small.yaml").write_text(to_yaml(small_config))
    return "small.yaml"


@pytest.fixture
def run_copy(trained_run) -> Path:
    """A trained runs/small in the current folder, to be spoiled."""
    return Path(shutil.copytree(trained_run, "runs/small"))


@pytest.fixture
def without_reader(monkeypatch) -> Callable[[], AbstractContextManager[None]]:
    """`with without_reader():` standard output is a pipe that nobody reads any more."""

    @contextmanager
    def closed() -> Iterator[None]:
        ours, theirs = os.pipe()
        os.close(ours)
        with pytest.raises(BrokenPipeError):
            os.write(theirs, b"is there anybody?")
        with monkeypatch.context() as patch, os.fdopen(theirs, "w") as pipe:
            patch.setattr("sys.stdout", pipe)
            yield
            assert not stat.S_ISFIFO(os.fstat(theirs).st_mode)  # what was left goes nowhere

    return closed


@pytest.fixture
def refused(capsys):
    """Check that a command ends with code 2 and one line on standard error, and return the line."""

    def check(code: int) -> str:
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("hldm: ") and error.count("\n") == 1, (code, error)
        return error

    return check


def truncate(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of a tiny model with random weights. Read only: copy it to change it."""
    from tiny_model import tiny_pipeline

    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder
