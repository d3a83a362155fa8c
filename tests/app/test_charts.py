"""Charts show where the values are, with round ticks and names that do not cover each other or become markup."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from hldm.app.report import charts
from hldm.app.report.charts import Line, line_chart, log_ticks, tick_name, ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.27, 1.31), (-3e-4, 2e-4), (0, 2.4e7), (5, 5.000001)])
def test_ticks_are_round_and_within(low, high):
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 11 and low <= found[0] and found[-1] <= high * (1 + 1e-9) + 1e-12
    steps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert max(steps) == pytest.approx(min(steps))
    assert f"{steps[0]:.0e}"[0] in "125"


def test_ticks_of_a_logarithmic_axis_are_powers_or_1_2_and_5():
    assert log_ticks(0.3, 2.5) == pytest.approx([0.5, 1, 2])
    assert log_ticks(0.5, 20_000) == pytest.approx([1, 10, 100, 1000, 10_000])


def test_names_of_ticks_are_short():
    assert [tick_name(x) for x in (0, 0.05, 1500, 2e6, 3.5e9)] == ["0", "0.05", "1.5k", "2M", "3.5G"]


def texts_of(svg: str, kind: str) -> list[ElementTree.Element]:
    return [
        node for node in ElementTree.fromstring(svg).iter("text") if node.get("class", "").startswith(kind)
    ]


def test_the_axis_begins_where_the_values_do():
    svg = line_chart(
        "bits", [Line("model", [(x, 1.30 - x / 1000) for x in range(20)], "total")], "minutes", ".3f"
    )
    shown = [float(node.text) for node in texts_of(svg, "tick") if node.get("text-anchor") == "end"]
    assert min(shown) > 1.2 and max(shown) < 1.4


def test_a_wild_beginning_leaves_the_frame():
    points = [(0.0, 1e6), *((float(x), 2 - x / 100) for x in range(1, 50))]
    svg = line_chart("bits", [Line("model", points, "total")], "steps")
    assert all(float(node.text) < 10 for node in texts_of(svg, "tick") if node.get("text-anchor") == "end")
    drawn = re.findall(r"[\d.-]+,([\d.-]+)", ElementTree.fromstring(svg).find("polyline").get("points"))
    assert all(0 <= float(y) <= charts.HEIGHT for y in drawn)


def test_names_stand_at_the_ends_and_do_not_overlap():
    lines = [Line(f"line {k}", [(0, 1), (1, 1 + k / 1000)], "other") for k in range(5)]
    heights = sorted(float(node.get("y")) for node in texts_of(line_chart("x", lines, "steps"), "name"))
    gaps = [b - a for a, b in zip(heights, heights[1:], strict=False)]
    assert min(gaps) >= charts.NAME_HEIGHT - 0.11 and heights[-1] <= charts.HEIGHT


def test_names_are_escaped():
    svg = line_chart("<b>", [Line("</svg><script>", [(0, 1), (1, 2)], "other")], "&")
    ElementTree.fromstring(svg)
    assert "<script>" not in svg


def test_a_single_point_is_no_curve():
    assert line_chart("x", [Line("one", [(0, 1)], "other")], "steps") == ""
