"""Memory limits of containers and jobs are found."""

from __future__ import annotations

import psutil
import pytest

from hldm.runs import machine


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/job", "job", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:memory:/job",
            "memory/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
@pytest.mark.parametrize("inside", ["", "step"])
def test_the_limit_of_a_cgroup_or_of_one_above_it_is_found(line, folder, names, inside, tmp_path):
    root = tmp_path / "cgroup"
    place = root / folder
    (place / inside).mkdir(parents=True, exist_ok=True)
    (tmp_path / "groups").write_text(f"9:cpu:/other\n{line}/{inside}\n")
    if inside:
        (place / inside / names[0]).write_text("max\n")
    (place / names[0]).write_text("100000000\n")
    (place / names[1]).write_text("90000000\n")
    (place / "memory.stat").write_text(f"anon 3\n{names[2]} 40000000\n")
    own = psutil.Process().memory_info().rss
    found, where = machine.available_memory(tmp_path / "groups", root)
    assert where == "in this cgroup" and found == pytest.approx(50_000_000 + own, abs=2**22)
