"""Same seed, same text; a batch writes what its rows write alone; state carried equals text read again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hldm.chunking.chunker import make_chunker
from hldm.config import (
    AutoencoderConfig,
    ChunkingConfig,
    DiffusionConfig,
    GenerationConfig,
    GriffinConfig,
    HierarchyConfig,
    PriorConfig,
    changed,
)
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.generation.writer import (
    Continuation,
    LatentWriter,
    _prompt_windows,
    make_writer,
    next_context,
    row_generators,
    write_on,
)
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.runs.files import fingerprint
from hldm.text.bytes import END_OF_DOCUMENT, PROMPT_WINDOW, count_characters
from hldm.text.windows import window_of

GRIFFIN = GriffinConfig(width=16, blocks=("recurrent", "attention"), heads=2)
SETTINGS = GenerationConfig(steps=3)
PROMPTS = [b"And the king said", b"", b"caf\xc3\xa9 \xf0\x9f\x91\x91 \xff\xfe", b"a" * 300]


def make_model(
    latent_dim: int = 4,
    carry_state: bool = False,
    reads_text: bool = False,
    components: int = 0,
    trunk_layers: int = 0,
    pooling: str = "mean",
) -> tuple[Autoencoder, Prior | None]:
    torch.manual_seed(0)
    settings = AutoencoderConfig(
        latent_dim=latent_dim,
        encoder=GRIFFIN,
        decoder=GRIFFIN,
        carry_state=carry_state,
        reads_text=reads_text,
        trunk_layers=trunk_layers,
        trunk_width=24,
        components=components,
        pooling=pooling,
    )
    strategy = "words" if latent_dim and pooling == "mean" else "fixed"
    chunking = ChunkingConfig(strategy=strategy, min_bytes=6 if pooling == "strided" else 2, max_bytes=6)
    autoencoder = Autoencoder.from_settings(settings, chunking).eval()
    if not latent_dim:
        return autoencoder, None
    prior = Prior.from_settings(
        settings,
        PriorConfig(
            reads_text=reads_text,
            width=16,
            layers=1,
            heads=2,
            denoiser_layers=1,
        ),
        HierarchyConfig(levels=2, ratio=2, window=2),
        DiffusionConfig(),
    )
    torch.nn.init.normal_(prior.denoiser.outputs.weight, std=0.3)
    return autoencoder, prior.eval()


def write(model, prompts, settings=SETTINGS, characters=30, **options) -> list[bytes]:
    rows = []
    for rows, _, _ in write_on(*model, prompts, settings, max_characters=characters, **options):  # noqa: B007
        pass
    return [row.text for row in rows]


TRUNK = dict(trunk_layers=1, components=4)
LATENT = [
    dict(),
    dict(carry_state=True),
    dict(reads_text=True),
    dict(components=4),
    TRUNK,
    dict(reads_text=True, **TRUNK),
    dict(carry_state=True, reads_text=True, **TRUNK),
    dict(pooling="strided"),
    dict(reads_text=True, pooling="strided"),
]
MODELS = [*LATENT, dict(latent_dim=0, carry_state=True)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scheduler", ["ancestral", "dpm"])
def test_a_batch_of_prompts_writes_what_each_writes_alone(kind, scheduler):
    # a batch's products round otherwise than a row's: one draw in some hundred thousand lies that close to a border
    model = make_model(**kind)
    settings = changed(SETTINGS, scheduler=scheduler)
    together = write(model, PROMPTS, settings, seed=11, through_ends=True)
    alone = [
        write(model, [prompt], settings, seed=11 + i, through_ends=True)[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert together == write(model, PROMPTS, settings, seed=11, through_ends=True)
    assert together != write(model, PROMPTS, settings, seed=12, through_ends=True)
    assert all(count_characters(text) == 30 for text in together)


@pytest.mark.parametrize("kind", LATENT)
def test_going_on_from_carried_state_equals_reading_everything_again(kind):
    autoencoder, prior = make_model(**kind)
    autoencoder.outputs.bias.data[END_OF_DOCUMENT:].fill_(-100.0)  # one document throughout
    with torch.no_grad():
        writer = make_writer(autoencoder, prior, [b"In the beginning"], SETTINGS, row_generators(3, 1))
        chunks = [writer.write()[0].text for _ in range(12)]
        # the same text, cut where the writer cut it, read in one go
        text = b"In the beginning" + b"".join(chunks)
        again = LatentWriter(autoencoder, prior, [b""], SETTINGS, row_generators(3, 1))
        start = make_chunker(autoencoder.chunking).chunk_start(b"In the beginning").tolist()
        for chunk in chunks:
            start += [True] + [False] * (len(chunk) - 1)
        again._read(window_of([text], [np.array(start)], [True]))
        again.conditioning = prior.condition(next_context(prior, again.memory))
        torch.testing.assert_close(again.encoder, writer.encoder, rtol=1e-4, atol=1e-5)
        again.generators, writer.generators = row_generators(4, 1), row_generators(4, 1)
        torch.testing.assert_close(again.sample_latents(), writer.sample_latents(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "guidance"), [*((kind, 1.0) for kind in LATENT), (LATENT[0], 1.5), (LATENT[6], 1.5)]
)
def test_kernels_write_what_torch_writes_through_the_ends_of_documents(plain_torch, kind, guidance):
    autoencoder, prior = make_model(**kind)
    autoencoder.outputs.bias.data[END_OF_DOCUMENT] = 4.0
    settings, options = changed(SETTINGS, guidance=guidance), dict(seed=5, characters=30, through_ends=True)
    rows = write((autoencoder, prior), PROMPTS, settings, **options)
    with plain_torch():
        assert rows == write((autoencoder, prior), PROMPTS, settings, **options)


def test_a_prompt_read_in_many_windows_is_the_same_prompt(monkeypatch):
    model = make_model(carry_state=True)
    prompts = [b"In the beginning was the word, and so on, and so on. " * 3, b"Short one"]
    whole = write(model, prompts)
    monkeypatch.setattr("hldm.generation.writer.PROMPT_WINDOW", 16)
    assert write(model, prompts) == whole


@pytest.mark.parametrize("kind", MODELS)
def test_prompts_leave_the_same_state_whatever_the_window(kind, monkeypatch):
    autoencoder, prior = make_model(**kind)
    prompts = [b"In the beginning was the word, and so on. ", b"", b"Short one"]

    def states(window):
        monkeypatch.setattr("hldm.generation.writer.PROMPT_WINDOW", window)
        with torch.no_grad():
            writer = make_writer(autoencoder, prior, prompts, SETTINGS, row_generators(3, 3))
        if prior is None:
            return writer.state, writer.opens
        summary = next_context(prior, writer.memory).summary
        return writer.encoder, writer.decoder, summary, writer.memory.partial, writer.opens

    whole = states(100_000)
    for window in (1, 16, 30):
        torch.testing.assert_close(states(window), whole, rtol=1e-4, atol=1e-5)


def test_windows_of_prompts_have_one_shape_and_as_many_bytes_whatever_the_number_of_rows():
    autoencoder, _ = make_model()
    text = b"In the beginning was the word, and so on, and so on. " * 60
    for rows in (1, 3, 16):
        prompts = [text[row:] for row in range(rows)]
        windows = list(_prompt_windows(autoencoder, prompts, torch.device("cpu")))
        assert len({(window.bytes.shape, window.chunks) for window in windows}) == 1
        assert windows[0].bytes.numel() <= PROMPT_WINDOW + rows * autoencoder.chunking.max_bytes
        for row, prompt in enumerate(prompts):
            read = [bytes(window.bytes[row, : window.length[row]].tolist()) for window in windows]
            assert b"".join(read) == prompt
            assert max(int(window.chunk_start[row].sum()) for window in windows) <= windows[0].chunks


@pytest.mark.slow
def test_memory_of_the_context_does_not_grow_with_the_text():
    autoencoder, prior = make_model()
    sizes = set()
    with torch.no_grad():
        writer = LatentWriter(autoencoder, prior, [b""], SETTINGS, row_generators(0, 1))
        for _ in range(80):
            writer.write()
            sizes.add((writer.memory.hidden.numel(), writer.conditioning.blocks[0].key.shape))
    assert len(sizes) <= 2  # where a document has just begun there is no newest chunk


def test_the_twin_writes_what_it_scores():
    # greedy bytes of the twin are the argmax of its own teacher-forced logits
    autoencoder, _ = make_model(latent_dim=0, carry_state=True)
    settings = GenerationConfig(decoder_temperature=0.0)
    prompt = b"And the king"
    text = write((autoencoder, None), [prompt], settings, characters=20, through_ends=True)[0]
    full = prompt + text
    window = window_of([full], [make_chunker(autoencoder.chunking).chunk_start(full)], [True])
    state = autoencoder.decoder_state(1)
    with torch.no_grad():
        logits, _ = autoencoder.decode(autoencoder.events(window, state), None, state.griffin)
    assert bytes(logits[0, len(prompt) :, :256].argmax(-1).tolist()) == text


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_budget_of_characters_never_splits_one_however_they_come(size):
    text = "añ👑b".encode()
    for characters, wanted in enumerate(["", "a", "añ", "añ👑", "añ👑b"]):
        row = Continuation(b"", left=characters)
        taken = [row.add(text[at : at + size]) for at in range(0, len(text), size)]
        assert b"".join(taken) == row.text and row.text.decode() == wanted


@pytest.mark.parametrize("latent_dim", [0, 4])
def test_a_pipeline_saved_and_loaded_writes_the_same_text(tmp_path, latent_dim):
    autoencoder, prior = make_model(latent_dim=latent_dim, carry_state=True)
    if prior is not None:
        prior.register_to_config(autoencoder=fingerprint(autoencoder.state_dict()))
    pipeline = HLDMPipeline.assemble(autoencoder, prior, SETTINGS)
    pipeline.save_pretrained(tmp_path / "pipeline")
    streamed: dict[int, str] = {}
    output = pipeline(
        ["And", "Then"],
        max_characters=20,
        num_return_sequences=2,
        streamer=lambda row, text: streamed.update({row: streamed.get(row, "") + text}),
    )
    again = read_pipeline(tmp_path / "pipeline")(["And", "Then"], max_characters=20, num_return_sequences=2)
    assert again.texts == output.texts and len(output.texts) == 4
    assert [streamed[row] for row in range(4)] == output.texts
    drawn = [
        pipeline("And", max_characters=9, generator=torch.Generator().manual_seed(seed)).texts
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert output.chunk_spans[0][-1][1] == len(output.sequences[0])


def test_a_prior_of_another_autoencoder_is_refused():
    autoencoder, prior = make_model()
    prior.register_to_config(autoencoder="0" * 64)
    with pytest.raises(ValueError, match="another autoencoder"):
        HLDMPipeline.assemble(autoencoder, prior, SETTINGS)


def test_without_denoising_steps_latents_are_drawn_from_the_mixture():
    model = make_model(components=4, reads_text=True)
    settings = changed(SETTINGS, steps=0)
    together = write(model, PROMPTS, settings, seed=7, through_ends=True)
    assert together == [
        write(model, [prompt], settings, seed=7 + i, through_ends=True)[0] for i, prompt in enumerate(PROMPTS)
    ]
    with pytest.raises(ValueError, match="no mixture"):
        write(make_model(), PROMPTS, settings)
