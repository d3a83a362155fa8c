from dataclasses import replace

import pytest
import torch

from hldm.chunking.chunker import make_chunker
from hldm.config import AutoencoderConfig, ChunkingConfig, GriffinConfig, changed
from hldm.model.autoencoder import Autoencoder
from hldm.model.likelihood import sum_by_chunk, symbol_nats
from hldm.text.bytes import END_OF_CHUNK, END_OF_DOCUMENT, START
from hldm.text.windows import Window, window_of

GRIFFIN = GriffinConfig(width=16, blocks=("recurrent", "attention"), heads=2)
CHUNKING = ChunkingConfig(strategy="words", min_bytes=2, max_bytes=6)
CONSTANT = ChunkingConfig(strategy="fixed", min_bytes=6, max_bytes=6)
TEXT = b"In the beginning was the word. And then? Nothing much, it seems."


def make_autoencoder(carry_state: bool = False, latent_dim: int = 4, pooling: str = "mean") -> Autoencoder:
    torch.manual_seed(0)
    settings = AutoencoderConfig(
        latent_dim=latent_dim,
        encoder=GRIFFIN,
        decoder=GRIFFIN,
        trunk_layers=0,
        carry_state=carry_state,
        reads_text=False,
        pooling=pooling,
    )
    chunking = CHUNKING if latent_dim else changed(CHUNKING, strategy="fixed")
    chunking = CONSTANT if pooling == "strided" else chunking
    return Autoencoder.from_settings(settings, chunking).double().eval()


def read(model: Autoencoder, text: bytes) -> Window:
    """One document as a batch of one row."""
    start = make_chunker(model.chunking).chunk_start(text)
    window = window_of([text], [start], [True])
    window.doc_end[:, len(text) - 1] = True
    return window


def widen(state):
    from hldm.model.state import map_carry

    return map_carry(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, state)


def encode(model: Autoencoder, window: Window, state=None):
    state = widen(model.encoder_state(len(window.length))) if state is None else state
    return model.encode(window, state)


def logits_of(model: Autoencoder, window: Window, latent, state=None):
    state = widen(model.decoder_state(len(window.length))) if state is None else state
    events = model.events(window, state)
    logits, griffin = model.decode(events, latent, state.griffin)
    return events, logits, state._replace(griffin=griffin, symbol=events.last)


def with_byte(window: Window, at: int, byte: int) -> Window:
    """The window with one byte of its first row replaced."""
    text = window.bytes.clone()
    text[0, at] = byte
    return replace(window, bytes=text)


def test_events_spell_the_chunks_each_with_its_end():
    model = make_autoencoder()
    w = read(model, TEXT)
    events, _, _ = logits_of(model, w, encode(model, w)[0].latents)
    targets = events.target[0].tolist()
    assert bytes(t for t in targets if t < 256) == TEXT
    assert targets[-1] == END_OF_DOCUMENT and targets.count(END_OF_CHUNK) == w.chunks - 1
    # each chunk opens with START and goes on with the byte just written
    for symbol, before, opens in zip(
        events.symbol[0].tolist(), [None, *targets[:-1]], events.unit_start[0].tolist(), strict=True
    ):
        assert symbol == (START if opens else before)


def test_the_twin_reads_whole_documents_without_ends_inside():
    model = make_autoencoder(latent_dim=0)
    events, _, _ = logits_of(model, read(model, TEXT), None)
    assert events.target[0].tolist() == [*TEXT, END_OF_DOCUMENT]
    assert events.symbol[0].tolist() == [START, *TEXT]


@pytest.mark.parametrize(("latent_dim", "pooling"), [(0, "mean"), (4, "mean"), (4, "strided")])
def test_a_document_cut_between_chunks_reads_like_one_piece(latent_dim, pooling):
    model = make_autoencoder(carry_state=True, latent_dim=latent_dim, pooling=pooling)
    w = read(model, TEXT)
    chunks = w.first_byte[0].tolist()
    cut = chunks[len(chunks) // 2]
    encoding = encode(model, w)[0] if latent_dim else None
    events, logits, _ = logits_of(model, w, encoding.latents if encoding else None)
    nats = sum_by_chunk(symbol_nats(logits, events), events, len(chunks))[0]
    found, encoder, decoder, befores = [], None, None, []
    for part in (slice(0, cut), slice(cut, None)):
        flags = {k: getattr(w, k)[:, part] for k in ("bytes", "doc_start", "doc_end", "chunk_start")}
        length, count = torch.tensor([flags["bytes"].shape[1]]), int(flags["chunk_start"].sum())
        piece = Window(**flags, length=length, chunks=count)
        latents = None
        if latent_dim:
            piece_encoding, encoder = encode(model, piece, encoder)
            latents = piece_encoding.latents
            befores.append(piece_encoding.before)
        events, logits, decoder = logits_of(model, piece, latents, decoder)
        found.append(sum_by_chunk(symbol_nats(logits, events), events, count)[0])
    torch.testing.assert_close(torch.cat(found), nats)
    if encoding is not None:
        torch.testing.assert_close(torch.cat(befores, dim=1), encoding.before)


def test_a_fresh_decoder_knows_nothing_but_its_latent():
    model = make_autoencoder(carry_state=False)
    w = read(model, TEXT)
    latents = encode(model, w)[0].latents.detach().requires_grad_(True)
    events, logits, _ = logits_of(model, w, latents)
    for chunk in (1, 5):
        (grad,) = torch.autograd.grad(logits[events.chunk == chunk].sum(), latents, retain_graph=True)
        assert grad.abs().sum(dim=-1).nonzero().tolist() == [[0, chunk]]


@pytest.mark.parametrize("latent_dim", [0, 4])
def test_no_event_sees_the_byte_it_has_to_write(latent_dim):
    model = make_autoencoder(carry_state=True, latent_dim=latent_dim)
    w = read(model, TEXT)
    latents = encode(model, w)[0].latents if latent_dim else None
    before_events, before, _ = logits_of(model, w, latents)
    at = 17
    _, after, _ = logits_of(model, with_byte(w, at, ord("z")), latents)
    place = at + int((before_events.target[0, : at + 1] >= END_OF_CHUNK).sum()) if latent_dim else at
    while int(before_events.target[0, place]) != TEXT[at]:
        place += 1
    torch.testing.assert_close(after[:, : place + 1], before[:, : place + 1])
    assert not torch.allclose(after[:, place + 1], before[:, place + 1])


def test_a_latent_is_a_function_of_its_chunk_and_the_text_before():
    model = make_autoencoder()
    w = read(model, TEXT)
    latents = encode(model, w)[0].latents
    at = 20
    chunk = int(w.chunk_id[0, at])
    after = encode(model, with_byte(w, at, ord("z")))[0].latents
    torch.testing.assert_close(after[:, :chunk], latents[:, :chunk])
    assert not torch.allclose(after[:, chunk], latents[:, chunk])


@pytest.mark.parametrize("pooling", ["mean", "strided"])
def test_padding_and_neighbours_change_nothing(pooling):
    model = make_autoencoder(pooling=pooling)
    texts = [TEXT, TEXT[:23], b"a"]
    alone = [encode(model, read(model, text))[0].latents[0] for text in texts]
    starts = [make_chunker(model.chunking).chunk_start(text) for text in texts]
    batch = window_of(texts, starts, [True] * 3)
    encoding, _ = encode(model, batch)
    for row, latents in enumerate(alone):
        torch.testing.assert_close(encoding.latents[row, : len(latents)], latents)
        assert not encoding.latents[row, len(latents) :].any()


def test_saving_and_loading_gives_the_same_model(tmp_path):
    model = make_autoencoder().float()
    model.save_pretrained(tmp_path)
    again = Autoencoder.from_pretrained(tmp_path)
    assert again.settings == model.settings and again.chunking == model.chunking
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
