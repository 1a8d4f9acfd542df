"""Line charts as inline SVG for HTML pages. A little script of `o2o.report.html` shows their values on hover."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from o2o.report.html import escape
from o2o.report.stats import Band

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 42
MOST = 200
"""Most points of a line; of more, every k-th is drawn."""
SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "cross")
"""Markers in the order of the colours, so that lines are told apart without colour."""


@dataclass(frozen=True)
class Line:
    """A named line; a band as wide as the line is drawn without shade."""

    label: str
    band: Band
    index: int = 0
    """Number of its colour and marker."""
    published: bool = False
    """Other people's figures: dashed and thin, with hollow markers."""


def number(value: float) -> str:
    """Return a number with four significant digits."""
    return f"{value:.4g}"


def thin(band: Band) -> Band:
    """Return every k-th point of a band, the last one included, so that at most `MOST` are left."""
    size = len(band.steps)
    if size <= MOST:
        return band
    kept = np.arange(size - 1, -1, -math.ceil(size / MOST))[::-1]
    return Band(*(part[kept] for part in (band.steps, band.centre, band.low, band.high)))


def limits(lines: Sequence[Line], fixed: tuple[float, float] | None = None) -> tuple[float, float]:
    """Return the vertical range of lines with a margin; `fixed` is a range to use instead."""
    if fixed is None:
        ends = [part[np.isfinite(part)] for line in lines for part in (line.band.low, line.band.high)]
        values = np.concatenate([*ends, np.zeros(0)])
        fixed = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    margin = 0.05 * ((fixed[1] - fixed[0]) or abs(fixed[1]) or 1.0)
    return fixed[0] - margin, fixed[1] + margin


def marker(index: int, x: float, y: float, size: float = 3.5) -> str:
    """Return the marker of line `index` at a place of the picture."""
    shape, r = SHAPES[index % len(SHAPES)], size
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    paths = {
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        "triangle": f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {2 * r + 1}h{-2 * r - 2}z",
        "diamond": f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
        "down": f"M{x:.1f} {y + r + 1:.1f}l{r + 1} {-2 * r - 1}h{-2 * r - 2}z",
        "plus": f"M{x - r:.1f} {y - 1:.1f}h{r - 1}v{1 - r}h2v{r - 1}h{r - 1}v2h{1 - r}v{r - 1}h-2v{1 - r}h{1 - r}z",
        "cross": f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}M{x - r:.1f} {y + r:.1f}l{2 * r} {-2 * r}",
    }
    return f'<path class="mark" d="{paths[shape]}"/>'


def chart(
    title: str,
    lines: Sequence[Line],
    xlabel: str,
    within: tuple[float, float],
    shaded: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    level: tuple[str, float] | None = None,
) -> str:
    """Return an SVG of lines over one axis with the vertical range `within`.

    `marks` are labelled vertical lines, `level` is a labelled horizontal one; `shaded`: a grey ground.
    """
    kept = [replace(line, band=thin(line.band)) for line in lines]
    ends = [float(step) for line in kept for step in line.band.steps]
    left, right = min([0.0, *ends]), max([*ends, *(place for place, _ in marks)], default=1.0) or 1.0
    low, high = within
    inner, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(value: float) -> float:
        return LEFT + inner * (value - left) / ((right - left) or 1.0)

    def y(value: float) -> float:
        return TOP + tall * (high - value) / ((high - low) or 1.0)

    parts = [f'<rect class="{"shaded" if shaded else "ground"}" x="{LEFT}" y="{TOP}" width="{inner}" height="{tall}"/>']
    for tick in _ticks(low, high):
        parts += [f'<path class="grid" d="M{LEFT} {y(tick):.1f}h{inner}"/>']
        parts += [f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>']
    steps = EngFormatter(sep="")
    for tick in _ticks(left, right):
        place = "end" if tick == right else "middle"
        parts += [f'<path class="axis" d="M{x(tick):.1f} {HEIGHT - BOTTOM}v4"/>']
        parts += [
            f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="{place}">'
            f"{escape(steps(tick)) if right > 10 else f'{tick:.3g}'}</text>"
        ]
    parts += [f'<path class="axis" d="M{LEFT} {TOP}v{tall}h{inner}"/>']
    parts += [f'<text x="{LEFT + inner / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(xlabel)}</text>']
    words = []  # drawn last, so that no line hides them
    for place, text in marks:
        parts += [f'<path class="mark-line" d="M{x(place):.1f} {TOP}v{tall}"/>']
        words += [f'<text class="tick note" x="{x(place) + 4:.1f}" y="{HEIGHT - BOTTOM - 6}">{escape(text)}</text>']
    if level is not None and low <= level[1] <= high:
        parts += [f'<path class="level" d="M{LEFT} {y(level[1]):.1f}h{inner}"/>']
        words += [
            f'<text class="tick note" x="{WIDTH - RIGHT - 3}" y="{y(level[1]) - 4:.1f}" text-anchor="end">'
            f"{escape(level[0])} {number(level[1])}</text>"
        ]
    points: dict[float, list[list[str]]] = {}
    for line in kept:
        drawn, shown = _line(line, x, y)
        parts += drawn
        for step, text in shown:
            points.setdefault(step, []).append([line.label, text])
    values = [[round(x(step), 1), f"{step:g}", rows] for step, rows in sorted(points.items())]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(title)}" '
        f'data-unit="{escape(xlabel)}" data-points="{escape(json.dumps(values))}">{"".join([*parts, *words])}</svg>'
    )


def _classes(line: Line) -> str:
    """Return the classes of a line: where the colours begin again, lines are dashed."""
    again, theirs = " again" * (line.index >= len(SHAPES)), " published" * line.published
    return f"c{line.index % len(SHAPES)}{again}{theirs}"


Scale = Callable[[float], float]


def _line(line: Line, x: Scale, y: Scale) -> tuple[list[str], list[tuple[float, str]]]:
    """Return the SVG of one line, and its points with their values as text."""
    band, color = line.band, _classes(line)
    known = np.isfinite(band.centre)
    band = Band(*(part[known] for part in (band.steps, band.centre, band.low, band.high)))
    if not len(band.steps):
        return [], []
    places = [(x(float(step)), y(float(value))) for step, value in zip(band.steps, band.centre, strict=True)]
    parts, wide = [], bool(np.any(band.high > band.low))
    if wide:
        upper = [f"{px:.1f} {y(float(top)):.1f}" for (px, _), top in zip(places, band.high, strict=True)]
        lower = [f"{px:.1f} {y(float(base)):.1f}" for (px, _), base in zip(places, band.low, strict=True)]
        parts += [f'<path class="band {color}" d="M{"L".join([*upper, *lower[::-1]])}z"/>']
    parts += [f'<path class="line {color}" d="M{"L".join(f"{px:.1f} {py:.1f}" for px, py in places)}"/>']
    every = max(1, len(places) // 12)
    marks = "".join(marker(line.index, px, py) for px, py in places[::-every])
    parts += [f'<g class="points {color}">{marks}</g>']
    shown = [
        (float(step), number(value) + (f" [{number(low)}, {number(high)}]" if wide else ""))
        for step, value, low, high in zip(band.steps, band.centre, band.low, band.high, strict=True)
    ]
    return parts, shown


def legend(lines: Iterable[Line]) -> str:
    """Return the legend of lines."""
    entries = [
        f'<li><svg viewBox="0 0 26 12" aria-hidden="true"><path class="line {_classes(line)}" d="M0 6h26"/>'
        f'<g class="points {_classes(line)}">{marker(line.index, 13, 6)}</g></svg>{escape(line.label)}</li>'
        for line in lines
    ]
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers within a range."""
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
