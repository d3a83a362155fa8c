"""What is written on from a draft is what the writer writes, stopped and gone on with or not."""

from __future__ import annotations

import pytest
import torch

from hldm.app.playground.drafting import Draft, chunk_generator
from hldm.config import changed
from hldm.generation.pipeline import read_pipeline
from hldm.generation.writer import make_writer

PROMPT = b"And the king said, "


@pytest.fixture(scope="module")
def models(trained_run):
    pipeline = read_pipeline(trained_run / "pipeline")
    return pipeline.autoencoder.eval(), pipeline.prior.eval(), changed(pipeline.settings, steps=3)


@pytest.mark.parametrize("prompt", [PROMPT, b"", b"x" * 3000])
def test_the_first_chunk_is_the_one_that_the_writer_writes(models, prompt):
    autoencoder, prior, settings = models
    (chunk,) = Draft(autoencoder, prior, prompt, [], settings).write(seed=5, draws=[0])
    with torch.no_grad():
        writer = make_writer(autoencoder, prior, [prompt], settings, [chunk_generator(5, 0, 0)])
        (piece,) = writer.write()
    assert (chunk.text, chunk.ends) == piece


def test_a_text_that_is_stopped_and_gone_on_with_is_the_same(models):
    autoencoder, prior, settings = models
    for seed in range(50):  # a model that has hardly been trained may end its document at any chunk
        draft = Draft(autoencoder, prior, PROMPT, [], settings)
        whole = [draft.write(seed, [0])[0] for _ in range(8)]
        if not any(chunk.ends for chunk in whole):
            break
    assert not any(chunk.ends for chunk in whole)  # or there is nothing to go on from
    texts = [chunk.text for chunk in whole]
    rest = Draft(autoencoder, prior, PROMPT, texts[:3], settings)
    assert [rest.write(seed, [0])[0].text for _ in range(5)] == texts[3:]


def test_borders_stay_where_they_were_put(models):
    autoencoder, prior, settings = models
    # the same bytes, cut as the chunker would not: another past, so another latent
    one = Draft(autoencoder, prior, PROMPT, [b"Go away"], settings).write(1, [0])[0]
    two = Draft(autoencoder, prior, PROMPT, [b"Go a", b"way"], settings)
    two.place = 1
    assert one.latent != two.write(1, [0])[0].latent


def test_candidates_are_the_draws_of_one_place(models):
    autoencoder, prior, settings = models
    several = Draft(autoencoder, prior, PROMPT, [b"Go "], settings, rows=4).write(2, [0, 1, 2, 3])
    assert len({tuple(chunk.latent) for chunk in several}) == 4
    for draw, chunk in enumerate(several):
        (alone,) = Draft(autoencoder, prior, PROMPT, [b"Go "], settings).write(2, [draw])
        assert alone.text == chunk.text and alone.latent == pytest.approx(chunk.latent, abs=1e-4)


def test_a_latent_that_is_held_is_the_one_written_from(models):
    autoencoder, prior, settings = models
    likeliest = changed(settings, decoder_temperature=0.0)
    draft = Draft(autoencoder, prior, PROMPT, [], likeliest, rows=3)
    latent = [0.5, -1.0, 0.25, 2.0]
    chunks = draft.write(0, [0, 1, 2], latent)
    assert all(chunk.latent == latent for chunk in chunks) and len({chunk.text for chunk in chunks}) == 1
    assert draft.write(0, [0, 1, 2])[0].latent != latent  # once released, it is drawn again


def test_the_twin_writes_on_too_and_holds_no_latent(small_twin, tmp_path):
    from hldm.training.stages import train_autoencoder

    pipeline = read_pipeline(train_autoencoder(small_twin, root=tmp_path) / "pipeline")
    models = pipeline.autoencoder, pipeline.prior
    for seed in range(20):
        draft = Draft(*models, PROMPT, [], pipeline.settings)
        chunks = [draft.write(seed, [0])[0] for _ in range(3)]
        if not any(chunk.ends for chunk in chunks):  # or there is nothing to go on from
            break
    first, second, third = (chunk.text for chunk in chunks)
    assert Draft(*models, PROMPT, [first, second], pipeline.settings).write(seed, [0])[0].text == third
    with pytest.raises(ValueError, match="no latents to hold"):
        draft.write(3, [0], [0.0])
