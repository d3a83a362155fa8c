"""Figures are what their ending says, the same each time, and show the differences that matter."""

from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hldm.runs.reports import PICTURES, check_picture_path
from hldm.studies import plots
from hldm.studies.plots import plot_league, plot_parts, plot_rate_curve

TWIN = {
    "name": "twin",
    "strategy": "twin",
    "target": None,
    "bound": 1.44,
    "standard_error": 0.0,
    "latent": 0.0,
}
LEAGUE = {
    "config": "small.yaml",
    "minutes": 10,
    "chunkers": [
        TWIN,
        *(
            {"strategy": name, "target": target, "bound": bound, "standard_error": 0.002, "latent": 0.6}
            for target in (6, 12)
            for name, bound in (("words", 1.546), ("space", 1.547), ("fixed", 1.553))
        ),
    ],
}
POINTS = [("twin", None, 1.61, 0.0), ("base", None, 1.84, 0.42)]
POINTS += [
    ("gamma_0", value, bound, share)
    for value, bound, share in ((-4, 2.37, 0.48), (-1, 1.74, 0.3), (3, 1.65, 0.01))
]
CURVE = {
    "config": "tiny.yaml",
    "minutes": 2,
    "compressors": {"xz": 1.697, "zpaq": 1.306, "ppmd": 1.31},
    "points": [
        {"dial": dial, "value": value, "bound": bound, "share": share, "standard_error": 0.001}
        for dial, value, bound, share in POINTS
    ],
}

WORTH = {"bits": 0.4, "standard_error": 0.01}
PARTS = {
    "run": "small",
    "characters": 1000,
    "rows": {
        "denoiser": {"part": "denoiser", "hidden": WORTH, "retrained": WORTH},
        "far": {"part": "  far", "hidden": {"bits": -0.0001, "standard_error": None}, "retrained": None},
    },
    "steps": [{"steps": 0, "over": 0.0}, {"steps": 2, "over": 0.1}, {"steps": 4, "over": 0.05}],
    "sure": {"model": 0.9, "twin": None},
    "agreement": {"share": 0.5},
}


@pytest.mark.parametrize(
    ("plot", "shown", "kind"),
    [*((plot_league, LEAGUE, kind) for kind in PICTURES), (plot_rate_curve, CURVE, "svg")],
)
def test_the_ending_says_what_a_figure_is_and_it_is_the_same_each_time(plot, shown, kind, tmp_path):
    paths = [tmp_path / f"{k}.{kind}" for k in range(2)]
    plot(shown, *paths)
    plot(shown, paths[1])
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(PICTURES[kind]) and len(first) > 4000
    assert first == second
    check_picture_path(paths[0])  # and may be drawn again
    with pytest.raises(ValueError, match="must end in .png, .svg, .pdf"):
        plot(shown, tmp_path / "figure.gif")


@pytest.fixture
def drawn(monkeypatch):
    """Draw; returns the axes."""
    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, paths: kept.append(figure))

    def draw(plot, shown):
        plot(shown)
        FigureCanvasAgg(kept[-1]).draw()
        return kept[-1].axes

    return draw


def test_the_league_shows_hundredths_and_names_its_twin(drawn):
    axes = drawn(plot_league, LEAGUE)
    bounds = axes[0::2]
    for ax in bounds:
        low, high = ax.get_xlim()
        assert 1.3 < low < 1.44 and 1.553 < high < 1.7
        assert any("twin 1.440" in text.get_text() for text in ax.texts)
        assert ax.get_legend() is None
    names = [label.get_text() for label in bounds[0].get_yticklabels()]
    assert names == ["fixed", "space", "words"]  # the best on top


def test_the_base_is_a_point_of_each_curve(drawn):
    (ax,) = drawn(plot_rate_curve, CURVE)
    curves = [line.get_xydata().tolist() for line in ax.lines if len(line.get_xydata()) == 4]
    assert curves == [[[0.01, 1.65], [0.3, 1.74], [0.42, 1.84], [0.48, 2.37]]]


def test_compressors_are_told_apart_and_their_names_do_not_overlap(drawn):
    (ax,) = drawn(plot_rate_curve, CURVE)
    across = [line for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in across}) == 4
    renderer = ax.figure.canvas.get_renderer()
    boxes = [
        text.get_window_extent(renderer)
        for text in ax.texts
        if text.get_text()[:3] in ("xz ", "zpa", "ppm", "twi")
    ]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_the_legend_of_parts_covers_no_bar(drawn):
    axes = drawn(plot_parts, PARTS)
    figure = axes[0].figure
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(ax.get_window_extent()) for ax in axes)
    assert [text.get_text() for text in legend.get_texts()] == ["hidden", "retrained"]


def test_a_picture_may_replace_one_of_its_kind_alone(tmp_path):
    path = tmp_path / "figure.svg"
    path.write_bytes(b"my own notes")
    with pytest.raises(ValueError, match="is there and is no .svg picture"):
        check_picture_path(path)
    path.write_bytes(b"<?xml version='1.0'?><svg/>")
    check_picture_path(path)
    with pytest.raises(ValueError, match="must end in"):
        check_picture_path(tmp_path / "figure")
