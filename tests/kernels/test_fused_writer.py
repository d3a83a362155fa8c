"""Which configurations the fused writers take, and what is said of the others."""

from __future__ import annotations

import pytest
import torch

from hldm.chunking.chunker import make_chunker
from hldm.config import ChunkingConfig, Config, load_config
from hldm.generation.writer import ByteWriter, LatentWriter, make_writer, row_generators
from hldm.kernels import writer as kernels
from hldm.kernels.writer import FusedByteWriter, FusedLatentWriter, why_plain
from hldm.model.autoencoder import Autoencoder
from hldm.model.denoiser import Denoiser
from hldm.model.prior import Prior
from hldm.studies import league, rate_curve
from tests.conftest import CONFIGS, ROOT

SMALLER = [
    f"autoencoder.{part}={size}"
    for part, size in {"encoder.width": 16, "decoder.width": 16, "trunk_width": 16, "components": 4}.items()
] + [f"{part}.heads=2" for part in ("autoencoder.encoder", "autoencoder.decoder", "prior")]
SMALLER += ["prior.width=16"]


@pytest.fixture(autouse=True)
def fused(plain_torch):
    """Skips where there are no kernels, and forgets what has been said."""
    kernels._say.cache_clear()
    with torch.no_grad():
        yield


def models(config: Config) -> tuple[Autoencoder, Prior | None]:
    """Both, untrained; text is cut into words where that would take a segmenter."""
    torch.manual_seed(0)
    autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking).eval()
    autoencoder.attached_chunker = make_chunker(ChunkingConfig())
    if config.is_twin:
        return autoencoder, None
    sections = (config.autoencoder, config.prior, config.hierarchy, config.diffusion)
    return autoencoder, Prior.from_settings(*sections).eval()


def start(config: Config, parts: tuple[Autoencoder, Prior | None] | None = None):
    autoencoder, prior = parts or models(config)
    return make_writer(autoencoder, prior, [b"Word by word", b""], config.generation, row_generators(0, 2))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_takes_the_fused_writer_whole(path, caplog):
    config = load_config(path, SMALLER)
    writer = start(config)
    assert type(writer) is (FusedByteWriter if config.is_twin else FusedLatentWriter)
    assert config.is_twin or not writer.plain
    assert len(writer.write()) == 2
    assert not caplog.messages


@pytest.mark.parametrize("strategy", league.STRATEGIES)
def test_every_strategy_of_the_league_takes_the_fused_writer_whole(strategy, caplog):
    overrides = [*SMALLER, f"chunking.strategy={'fixed' if strategy == 'strided' else strategy}"]
    if strategy in ("fixed", "strided"):
        overrides += ["chunking.min_bytes=6", "chunking.max_bytes=6"]
    overrides += ["autoencoder.pooling=strided"] if strategy == "strided" else []
    config = load_config(ROOT / "configs/tiny.yaml", overrides)
    autoencoder, prior = models(config)
    if not config.chunking.needs_segmenter:
        autoencoder.attached_chunker = None  # its own
    writer = start(config, (autoencoder, prior))
    assert type(writer) is FusedLatentWriter and not writer.plain and len(writer.write()) == 2
    assert not caplog.messages


@pytest.mark.parametrize("dial", rate_curve.DIALS)
def test_every_point_of_the_rate_curve_takes_the_fused_writer_whole(dial, caplog):
    key, values = rate_curve.DIALS[dial]
    for value in values:
        writer = start(load_config(ROOT / "configs/tiny.yaml", [*SMALLER, f"{key}={value:g}"]))
        assert type(writer) is FusedLatentWriter and not writer.plain
    assert not caplog.messages


@pytest.mark.parametrize(
    ("overrides", "steps", "line"),
    [
        (["autoencoder.reads_text=false"], set(), ""),
        (["autoencoder.reads_text=false", "prior.reads_text=false"], set(), ""),
        (["autoencoder.reads_text=false", "autoencoder.trunk_layers=0"], set(), ""),
        (["generation.steps=0"], set(), ""),
        (["generation.guidance=1.5"], {"denoise"}, "generation.guidance=1.5: latents are denoised in plain"),
        (["generation.steps=1001"], {"denoise"}, "generation.steps=1001 is above 1000: latents"),
        (["autoencoder.components=0"], {"denoise"}, "the prior corrects no mixture"),
        (["hierarchy.ratio=16", "hierarchy.levels=11"], {"context"}, "hierarchy.ratio^levels is above"),
        (
            ["chunking.strategy=fixed", "chunking.min_bytes=6", "chunking.max_bytes=6"]
            + ["autoencoder.pooling=strided"],
            set(),
            "",
        ),
    ],
)
def test_a_step_that_stays_in_torch_is_said_once_with_its_reason(overrides, steps, line, caplog):
    config = load_config(ROOT / "configs/tiny.yaml", [*SMALLER, *overrides])
    writer = start(config)
    assert isinstance(writer, FusedLatentWriter) and writer.plain.keys() == steps
    start(config)
    assert len(caplog.messages) == len(steps)
    assert all(said.startswith(line) for said in caplog.messages)


def test_a_denoiser_of_another_class_is_asked_in_torch_and_that_is_said(caplog):
    class OwnDenoiser(Denoiser):
        """Somebody's idea."""

        def forward(self, z, gamma, conditioning, estimate):
            return super().forward(z, gamma, conditioning, estimate) + 1

    config = load_config(ROOT / "configs/tiny.yaml", SMALLER)
    autoencoder, prior = models(config)
    prior.denoiser = OwnDenoiser(config.prior, config.hierarchy, config.autoencoder.latent_dim)
    writer = start(config, (autoencoder, prior))
    assert set(writer.plain) == {"denoise", "context"} and len(writer.write()) == 2
    assert caplog.messages[0].startswith("the denoiser is a OwnDenoiser: latents are denoised in plain torch")


def test_a_model_that_the_kernels_cannot_write_is_said_once_with_the_reason(caplog):
    config = load_config(ROOT / "configs/tiny.yaml", SMALLER)
    autoencoder, prior = models(config)
    prior.denoiser.own = torch.nn.Dropout(0.1)  # such as a class of one's own may have
    prior.train()
    for _ in range(2):
        assert type(start(config, (autoencoder, prior))) is LatentWriter
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("dropout is on")


def test_why_the_kernels_write_none_of_a_text():
    autoencoder, prior = models(load_config(ROOT / "configs/tiny.yaml", SMALLER))
    assert not why_plain(autoencoder, prior)
    with torch.enable_grad():
        assert "gradients" in why_plain(autoencoder, prior)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in why_plain(autoencoder, prior)
    assert "float32" in why_plain(autoencoder, prior.double())


def test_nothing_is_said_where_there_are_no_kernels(plain_torch, caplog):
    config = load_config(ROOT / "configs/tiny.yaml", [*SMALLER, "generation.guidance=1.5"])
    twin = load_config(ROOT / "configs/tiny-twin.yaml", SMALLER)
    with plain_torch():
        assert type(start(config)) is LatentWriter and type(start(twin)) is ByteWriter
    assert not caplog.messages


def test_weights_that_are_cast_while_text_is_written_are_not_read():
    config = load_config(ROOT / "configs/tiny-twin.yaml", SMALLER)
    autoencoder, _ = models(config)
    writer = start(config, (autoencoder, None))
    writer.write()
    autoencoder.double()
    with pytest.raises(RuntimeError, match="moved or cast"):
        writer.write()
