"""Line charts as inline SVG: colours of the page's theme, round ticks, a name at the end of each line.

The y axis shows where the values are, not zero; a few wild values of the beginning leave the frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 225
LEFT, RIGHT, TOP, BOTTOM = 46, 104, 12, 34  # margins: ticks, names of lines, nothing, the axis' name
MOST_POINTS = 300  # of a line: more than pixels shows nothing more
OPENING = 0.1  # share of a curve, its beginning, that may leave the frame
NAME_HEIGHT = 12  # of a line's name, so that two do not overlap


class Line(NamedTuple):
    """One curve."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str  # of the theme: latent, decoder, total, other
    is_dashed: bool = False  # of the run that is compared with


def line_chart(
    title: str, lines: Sequence[Line], x_name: str, y_form: str = "g", log: bool = False
) -> Markup:
    """An SVG of several curves over one x axis; nothing for curves without two points.

    log: of the y axis, where all values are positive
    """
    lines = [line._replace(points=_thinned(line.points)) for line in lines if len(line.points) > 1]
    if not lines:
        return Markup("")
    log = log and all(y > 0 for line in lines for _, y in line.points)
    x_most = max(x for line in lines for x, _ in line.points)
    x_least = min(0.0, *(x for line in lines for x, _ in line.points))
    scaled = math.log10 if log else float
    low, high = _range([line.points for line in lines], scaled)

    def x_at(x: float) -> float:
        return LEFT + (x - x_least) / max(x_most - x_least, 1e-12) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return TOP + (high - scaled(y)) / max(high - low, 1e-12) * (HEIGHT - TOP - BOTTOM)

    y_ticks = log_ticks(10**low, 10**high) if log else ticks(low, high, 5)
    parts = [_axis_y(y_at(y), tick_name(y)) for y in y_ticks]
    parts += [_axis_x(x_at(x), tick_name(x)) for x in ticks(x_least, x_most, 5)]
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_name)}</text>"
    )
    places = _spread([y_at(line.points[-1][1]) for line in lines])
    for line, place in zip(lines, places, strict=True):
        path = " ".join(f"{x_at(x):.1f},{min(max(y_at(y), 0), HEIGHT - BOTTOM):.1f}" for x, y in line.points)
        dashes = " dashed" if line.is_dashed else ""
        end_x = x_at(line.points[-1][0])
        parts.append(f'<polyline class="curve {line.colour}{dashes}" points="{path}"/>')
        parts.append(
            f'<text class="name {line.colour}" x="{min(end_x, WIDTH - RIGHT) + 5:.1f}" y="{place + 3:.1f}">'
            f"{escape(_named(line, y_form))}</text>"
        )
    ends = "; ".join(f"{_named(line, y_form)} at the end" for line in lines)
    return Markup(  # noqa: S704 - numbers, and names escaped above
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over '
        f'{escape(x_name)}: {escape(ends)}"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def _named(line: Line, form: str) -> str:
    return f"{line.name} {line.points[-1][1]:{form}}".strip()


def _axis_y(y: float, name: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{name}</text>'
    )


def _axis_x(x: float, name: str) -> str:
    y = HEIGHT - BOTTOM
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 4}"/>'
        f'<text class="tick" x="{x:.1f}" y="{y + 15}" text-anchor="middle">{name}</text>'
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS of them, the last among them."""
    every = -(-len(points) // MOST_POINTS)
    return [*points[: len(points) - 1 : every], points[-1]] if points else []


def _range(curves: Sequence[Sequence[tuple[float, float]]], scaled: object) -> tuple[float, float]:
    """Least and most of what is shown: all but the first tenth of every curve, with a little room."""
    assert callable(scaled)
    values = [scaled(y) for points in curves for _, y in points[int(OPENING * len(points)) :]]
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within [low, high], about so many: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = int(math.floor(high / step + 1e-9)) - first + 1
    return [round((first + k) * step, 12) for k in range(count)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; every power alone where there are more than four."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    found = [value for value in fine if low <= value <= high]
    whole = [10.0**power for power in powers if low <= 10.0**power <= high]
    return found if len(found) <= 4 or len(whole) < 2 else whole


def tick_name(value: float) -> str:
    """12k for 12000, 0.001 as it is."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def _spread(places: Sequence[float]) -> list[float]:
    """The same heights, moved apart so that names of NAME_HEIGHT do not overlap, in their order."""
    order = sorted(range(len(places)), key=lambda k: places[k])
    found = list(places)
    for above, below in zip(order, order[1:], strict=False):
        found[below] = max(found[below], found[above] + NAME_HEIGHT)
    limit = float(HEIGHT - BOTTOM)
    for index in reversed(order):
        found[index] = min(found[index], limit)
        limit = found[index] - NAME_HEIGHT
    return found
