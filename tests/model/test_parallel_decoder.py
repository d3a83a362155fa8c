"""A chunk written at once: a likelihood of lengths and bytes, blind to the bytes it writes, and true to its reading."""

from __future__ import annotations

import math

import pytest
import torch

from hldm.config import AutoencoderConfig, ChunkingConfig, ConfigError, GenerationConfig, GriffinConfig
from hldm.evaluation.bound import held_out_windows
from hldm.generation.chunk import write_chunks
from hldm.generation.writer import row_generators
from hldm.model.autoencoder import Autoencoder
from hldm.model.parallel_decoder import ParallelDecoder
from hldm.studies import bench_writing
from hldm.text.bytes import END_OF_CHUNK, END_OF_DOCUMENT
from hldm.text.corpus import make_corpus
from hldm.training.objectives import read_chunks, read_latents

GRIFFIN = GriffinConfig(width=16, blocks=("attention", "attention"), heads=2)
TRUNK = dict(trunk_layers=1, trunk_width=24)
KINDS = [dict(), dict(reads_text=True), TRUNK, dict(reads_text=True, **TRUNK)]
TEXTS = [
    b"In the beginning was the word. And then? Nothing much.",
    b"naive",
    b"He said: unquestionably so, again",
]


def make_autoencoder(**settings) -> Autoencoder:
    """Every parameter away from 0, so that whatever is read shows."""
    torch.manual_seed(0)
    config = AutoencoderConfig(latent_dim=3, encoder=GRIFFIN, decoder=GRIFFIN, writes="chunks", **settings)
    autoencoder = Autoencoder.from_settings(config, ChunkingConfig(min_bytes=2, max_bytes=6))
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return autoencoder.eval()


def windows_of(autoencoder: Autoencoder, texts=TEXTS):
    return held_out_windows(autoencoder, make_corpus("texts", texts))


@torch.no_grad()
def reading_of(autoencoder: Autoencoder, texts=TEXTS, seed: int = 1):
    """What the decoder makes of short texts, a row each, from latents that have nothing to do with them."""
    batch = windows_of(autoencoder, texts).batch(0)
    encoding, _ = read_latents(autoencoder, batch, autoencoder.encoder_state(len(batch.length)))
    latent = torch.randn(encoding.latents.shape, generator=torch.Generator().manual_seed(seed))
    state = autoencoder.decoder_state(len(batch.length))
    return read_chunks(autoencoder, batch, latent, state, encoding)[0], latent


@pytest.mark.parametrize("most", [5, 300])
@torch.no_grad()
def test_lengths_and_bytes_are_a_distribution(most):
    """Summed over lengths and ends: 1. Of each byte: 1, no matter which bytes are there."""
    torch.manual_seed(0)
    decoder = ParallelDecoder(GRIFFIN, most).double().eval()
    known = torch.randn(most + 1, 16).double()  # at each place, the end last
    total = 0.0
    for length in range(1, most + 1) if most < 10 else (1, 2, most):
        x = torch.cat([known[:length], known[-1:]])[None]
        start = torch.arange(length + 1)[None] == 0
        p = decoder(x, start, torch.tensor([length + 1]))[0].softmax(dim=-1)
        torch.testing.assert_close(p[:length, :256].sum(dim=1), torch.ones(length).double())
        total += float(p[length, [END_OF_CHUNK, END_OF_DOCUMENT]].sum())
        # the likeliest length is the likeliest symbol
        rivals = decoder.length_logits(known[-1:])[0].softmax(dim=-1)
        torch.testing.assert_close(p[length].max(), rivals.max())
        torch.testing.assert_close(p[length, [256, 257]], rivals[2 * length - 2 : 2 * length])
    assert most > 10 or total == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_byte_of_a_chunk_is_known_to_its_writer_but_all_before_it_are(kind):
    autoencoder = make_autoencoder(**kind)
    before, _ = reading_of(autoencoder)
    changed = [TEXTS[0][:8] + b"z" + TEXTS[0][9:], *TEXTS[1:]]  # a letter within `beginning`
    after, _ = reading_of(autoencoder, changed)
    # `In the`, ` begin`, `ning`, ...: its own chunk changes in the changed byte alone, later ones throughout
    row = 0
    moved = (after.symbol_nats[row] != before.symbol_nats[row]).nonzero()[:, 0]
    chunk = before.chunk[row]
    own = int(chunk[moved[0]])
    assert (chunk[moved] == own).sum() == 1
    assert bool((chunk[moved] > own).any()) == bool(kind)  # a fresh decoder knows the latent alone
    torch.testing.assert_close(after.symbol_nats[1:], before.symbol_nats[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_greedily_is_likeliest_when_read(kind):
    autoencoder = make_autoencoder(**kind)
    rows, chunks = 5, 4
    encoder, decoder = autoencoder.encoder_state(rows), autoencoder.decoder_state(rows)
    latents = torch.randn(rows, chunks, 3, generator=torch.Generator().manual_seed(2))
    settings = GenerationConfig(decoder_temperature=0.0)
    with torch.no_grad():
        autoencoder.decoder.lengths.bias[1::2] -= 100  # one document throughout
        for index in range(chunks):
            opens = [index == 0] * rows
            written = write_chunks(
                autoencoder, latents[:, index], encoder, decoder, opens, settings, row_generators(0, rows)
            )
            assert not any(piece.ends_document for piece in written.pieces)
            assert all(1 <= len(piece.text) <= 6 for piece in written.pieces)
            encoder, right = _read_back(autoencoder, written.pieces, opens, encoder, latents[:, index])
            assert right


def _read_back(autoencoder, pieces, opens, encoder, latent):
    """The state after the chunks, and whether every symbol of them is the likeliest."""
    longest = max(len(piece.text) for piece in pieces)
    text = torch.tensor([[*piece.text, *[0] * (longest - len(piece.text))] for piece in pieces])
    length = torch.tensor([len(piece.text) for piece in pieces])
    chunk_start = torch.arange(longest).expand_as(text) == 0
    doc_start = chunk_start & torch.tensor(opens)[:, None]
    encoding, encoder = autoencoder.encode(text, length, doc_start, chunk_start, encoder)
    never = torch.zeros_like(chunk_start)
    state = autoencoder.decoder_state(len(pieces))
    events = autoencoder.events(text, length, doc_start, never, chunk_start, state)
    logits, _ = autoencoder.decode(
        events.symbol,
        latent[:, None],
        events.chunk,
        events.doc_start,
        events.unit_start,
        state.griffin,
        events.length,
        told=autoencoder.tell(events, encoding),
    )
    return encoder, bool(((logits.argmax(dim=-1) == events.target) | ~events.mask).all())


def test_chunks_are_drawn_as_often_as_they_are_likely():
    autoencoder = make_autoencoder()
    rows = 4000
    latent = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).expand(rows, 3)
    states = autoencoder.encoder_state(rows), autoencoder.decoder_state(rows)
    settings = GenerationConfig(decoder_temperature=1.0)
    with torch.no_grad():
        written = write_chunks(autoencoder, latent, *states, [True] * rows, settings, row_generators(0, rows))
        told = autoencoder.told_by_latent(latent[:1], None)
        p = autoencoder.decoder.length_logits(told[:, -1])[0].softmax(dim=-1)
        first = autoencoder.decoder.byte_logits(told[:, :4], torch.tensor([3]))[0, 0].softmax(dim=-1)
    counts = torch.zeros_like(p)
    for piece in written.pieces:
        counts[2 * (len(piece.text) - 1) + piece.ends_document] += 1
    assert ((counts / rows - p).abs() < 4 * (p / rows).sqrt()).all()
    threes = [piece.text[0] for piece in written.pieces if len(piece.text) == 3]
    share = torch.bincount(torch.tensor(threes), minlength=256) / len(threes)
    assert ((share - first).abs() < 5 * (first / len(threes)).sqrt() + 1 / len(threes)).all()


def test_a_row_writes_what_it_writes_alone():
    autoencoder = make_autoencoder(reads_text=True, **TRUNK)
    latent = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))

    def write(rows: slice):
        mine = latent[rows]
        states = autoencoder.encoder_state(len(mine)), autoencoder.decoder_state(len(mine))
        generators = row_generators(0, 6)[rows]
        with torch.no_grad():
            return write_chunks(
                autoencoder, mine, *states, [False] * len(mine), GenerationConfig(), generators
            ).pieces

    assert [write(slice(row, row + 1))[0] for row in range(6)] == write(slice(0, 6))


def test_recomputed_activations_give_the_same_gradients():
    autoencoder = make_autoencoder(reads_text=True)
    batch = windows_of(autoencoder).batch(0)
    rows = len(batch.length)
    gradients = []
    for _ in range(2):
        autoencoder.zero_grad()
        encoding, _ = read_latents(autoencoder, batch, autoencoder.encoder_state(rows))
        state = autoencoder.decoder_state(rows)
        reading, _ = read_chunks(autoencoder, batch, encoding.latents, state, encoding)
        reading.nats.sum().backward()
        gradients.append([p.grad.clone() for p in autoencoder.parameters()])
        autoencoder.enable_gradient_checkpointing()
    torch.testing.assert_close(*gradients)


def test_a_deaf_decoder_pays_for_lengths_and_bytes_what_they_cost():
    autoencoder = make_autoencoder()
    for readout in (autoencoder.decoder.bytes, autoencoder.decoder.lengths):
        torch.nn.init.zeros_(readout.weight)
        torch.nn.init.zeros_(readout.bias)
    reading, _ = reading_of(autoencoder)
    windows = windows_of(autoencoder)
    expected = len(windows.corpus.text) * math.log(256) + windows.chunks * math.log(2 * 6)
    assert float(reading.nats.sum()) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_a_bench_writes_chunks_as_long_as_symbol_by_symbol():
    autoencoder = make_autoencoder()
    corpus = make_corpus("text", [b"aab" * 10])
    bench_writing.write_like(autoencoder, corpus, chunks=10)  # an end after three bytes
    p = autoencoder.decoder.length_logits(torch.randn(1, 16))[0].softmax(dim=-1).view(6, 2)
    expected = [0.25 * 0.75**k for k in range(5)]
    torch.testing.assert_close(p[:, 0], torch.tensor([*expected, 0.75**5]))
    assert float(p[:, 1].sum()) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(latent_dim=0), "latent_dim must not be 0"),
        (dict(carry_state=True), "carry_state must be false"),
        (dict(byte_dropout=0.1), "byte_dropout must be 0"),
        (dict(decoder=GriffinConfig()), "must all be attention, got"),
    ],
)
def test_what_a_chunk_at_once_cannot_have_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says) as error:
        AutoencoderConfig(**(dict(decoder=GRIFFIN, writes="chunks") | settings))
    assert "\n" not in str(error.value)
