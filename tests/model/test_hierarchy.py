import pytest
import torch

from hldm.config import HierarchyConfig
from hldm.model.hierarchy import Entries, level_starts, still_needed, summaries, visible, walk

SMALL = HierarchyConfig(levels=3, ratio=2, window=3)


def all_entries(chunks: int, config: HierarchyConfig) -> Entries:
    """Every latent and summary of one document of so many chunks."""
    found = [
        (level, end)
        for level in range(config.levels + 1)
        for end in range(config.ratio**level, chunks + 1, config.ratio**level)
    ]
    level, end = torch.tensor(found).T[:, None]
    return Entries(level, end, torch.zeros_like(level))


@pytest.mark.parametrize("config", [SMALL, HierarchyConfig(levels=2, ratio=8, window=16)])
def test_the_levels_tile_the_past_without_gap_or_overlap(config):
    chunks = 300
    entries = all_entries(chunks, config)
    written = torch.arange(chunks + 1)[None]
    sees = visible(written, torch.zeros_like(written), entries, config)[0]
    begin = entries.end[0] - config.ratio ** entries.level[0]
    for t in range(chunks + 1):
        covered = sorted(
            chunk
            for seen, b, e in zip(sees[t].tolist(), begin.tolist(), entries.end[0].tolist(), strict=True)
            if seen
            for chunk in range(b, e)
        )
        oldest = int(level_starts(torch.tensor(t), config)[-1])
        assert covered == list(range(oldest, t))


def test_context_grows_as_the_logarithm_of_the_text():
    config = HierarchyConfig(levels=8, ratio=4, window=4)
    for t in (10, 1_000, 100_000, 10_000_000):
        starts = level_starts(torch.tensor(t), config).tolist()
        uppers = [t, *starts[:-1]]
        counts = [(u - s) // 4**level for level, (u, s) in enumerate(zip(uppers, starts, strict=True))]
        assert all(count <= config.window + config.ratio - 1 for count in counts)
    # a hundred thousand times the text, nine levels of at most seven entries
    assert sum(counts) <= 9 * 7


def test_a_state_never_needs_more_than_its_capacity():
    entries = all_entries(500, SMALL)
    for t in range(501):
        born = entries._replace(document=torch.where(entries.end <= t, 0, -1))
        needed = still_needed(torch.tensor([t]), torch.tensor([0]), born, SMALL)
        assert int(needed.sum()) <= SMALL.capacity


def test_what_was_dropped_is_never_visible_again():
    entries = all_entries(200, SMALL)
    zero = torch.tensor([0])
    for t in range(0, 190):
        dropped = ~still_needed(torch.tensor([t]), zero, entries, SMALL) & (entries.end <= t)
        later = torch.arange(t, 201)[None]
        assert not (visible(later, torch.zeros_like(later), entries, SMALL) & dropped[:, None]).any()


def test_summaries_are_block_means_also_across_windows_and_documents():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 23, 2, generator=generator, dtype=torch.float64)
    doc_start = torch.zeros(1, 23, dtype=torch.bool)
    doc_start[0, [0, 9]] = True
    written, partial, found = torch.tensor([0]), torch.zeros(1, 3, 2, dtype=torch.float64), []
    document = -1
    for part in (slice(0, 5), slice(5, 6), slice(6, 17), slice(17, 23)):
        mask = torch.ones(1, part.stop - part.start, dtype=torch.bool)
        steps = walk(doc_start[:, part], mask, written)
        means, entries, partial = summaries(latents[:, part], mask, steps, partial, SMALL)
        for mean, level, end, doc in zip(
            means[0], entries.level[0], entries.end[0], entries.document[0], strict=True
        ):
            if doc >= 0:
                found.append((document + int(doc), int(level), int(end), mean))
        written = steps.written
        document += int(doc_start[:, part].sum())
    expected = []
    for number, (first, last) in enumerate([(0, 9), (9, 23)]):
        for level in (1, 2, 3):
            for end in range(2**level, last - first + 1, 2**level):
                block = latents[0, first + end - 2**level : first + end]
                expected.append((number, level, end, block.mean(dim=0)))
    found.sort(key=lambda entry: entry[:3])
    expected.sort(key=lambda entry: entry[:3])
    assert [entry[:3] for entry in found] == [entry[:3] for entry in expected]
    torch.testing.assert_close(
        torch.stack([entry[3] for entry in found]), torch.stack([entry[3] for entry in expected])
    )
