"""Rows of a writer that are copied or dropped go on as they would have gone on by themselves."""

from __future__ import annotations

import pytest
import torch
from conftest import without_kernels
from tiny_model import tiny_pipeline

from hldm.config import changed
from hldm.generation.branches import make_branches, write_branches
from hldm.generation.writer import make_writer, row_generators
from hldm.text.bytes import END_OF_DOCUMENT


def endless(**changes):
    pipe = tiny_pipeline(**changes)
    pipe.autoencoder.outputs.bias.data[END_OF_DOCUMENT] = -1e9
    torch.manual_seed(1)
    torch.nn.init.normal_(pipe.prior.denoiser.outputs.weight, std=0.3)
    return pipe


@pytest.fixture(params=["kernels", "plain"])
def either(request):
    """With the faster writers and without them."""
    if request.param == "plain":
        with without_kernels():
            yield
    else:
        yield


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (dict(), dict(steps=2)),
        (dict(), dict(steps=0)),
        (dict(trunk_layers=1), dict(steps=1, guidance=1.5)),
        (dict(carry_state=True), dict(steps=2)),
    ],
)
def test_picked_rows_go_on_as_the_rows_they_are_copies_of(kind, settings, either):
    pipe = endless(**kind)
    given = changed(pipe.settings, **settings)
    prompts = [b"And the king", b"", b"said to them all"]

    def written(picks: list[list[int]]) -> list[list[bytes]]:
        writer = make_writer(pipe.autoencoder, pipe.prior, prompts, given, row_generators(5, 3))
        chunks: list[list[bytes]] = [[], [], []]
        for step in range(12):
            if step in (0, 4, 7):  # before the first chunk, too
                rows = picks[(0, 4, 7).index(step)]
                # all draw the same: what differs is what they have read
                writer = writer.pick(rows, row_generators([100 * step + 7] * len(rows), len(rows)))
                chunks = [[*chunks[row]] for row in rows]
            for row, piece in zip(chunks, writer.write(), strict=True):
                row.append(piece.text)
        return chunks

    plain = written([[0, 1, 2], [0, 1, 2], [0, 1, 2]])
    assert written([[2, 1, 0, 2], [3, 0, 2, 1, 1], [0, 2]]) == [plain[2], plain[0]]
    assert plain[0] != plain[2]


@torch.no_grad()
def test_branches_of_a_prompt_write_what_the_prompt_writes_with_their_seeds(either):
    pipe = endless(trunk_layers=1)
    models = pipe.autoencoder, pipe.prior
    writer = make_branches(*models, [b"And", b"Then he"], pipe.settings, [[3, 4], [9]])
    found = [branch.text for branch in write_branches(writer, 6)]
    for text, prompt, seed in zip(found, [b"And", b"And", b"Then he"], [3, 4, 9], strict=True):
        alone = make_writer(*models, [prompt], pipe.settings, row_generators(seed, 1))
        assert text == b"".join(alone.write()[0].text for _ in range(6))
    with pytest.raises(ValueError, match="twin"):
        make_branches(pipe.autoencoder, None, [b""], pipe.settings, [[0]])


@torch.no_grad()
def test_held_latents_and_the_likeliest_bytes_leave_nothing_to_chance(either):
    pipe = endless(trunk_layers=1)
    models, likeliest = (pipe.autoencoder, pipe.prior), changed(pipe.settings, decoder_temperature=0.0)
    held = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    texts = []
    for seeds in ([0, 1], [7, 8]):
        writer = make_branches(*models, [b"And"], likeliest, [seeds])
        texts += [branch.text for branch in write_branches(writer, 5, held)]
    assert len(set(texts)) == 1
    writer = make_branches(*models, [b"And"], likeliest, [[0]])
    assert write_branches(writer, 5, -held)[0].text != texts[0]


@torch.no_grad()
def test_a_branch_ends_with_its_document():
    pipe = tiny_pipeline()
    pipe.autoencoder.outputs.bias.data[END_OF_DOCUMENT] = 1e9
    writer = make_branches(pipe.autoencoder, pipe.prior, [b""], pipe.settings, [[0, 1]])
    branches = write_branches(writer, 4)
    assert [len(branch.chunks) for branch in branches] == [1, 1] and all(b.ends_document for b in branches)
