"""Charts as SVG markup for an HTML page. Colours come from the page's style sheet, by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

WIDTH = 760
HEIGHT = 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 34, 42
_MARKED_POINTS = 60
"""Lines with more points get no dots."""
_TICKS = 5
_LOG_POWERS = 4
_CELL_HEIGHT = 22
_BAR_HEIGHT = 26
_LABEL_WIDTH = 190
_FAINTEST = 0.06

Text = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line of a chart: its name and its points (x, y), by x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Caption:
    """What a chart is called and says to those who do not see it; `ident` is unique in a page."""

    ident: str
    title: str
    description: str


def line_chart(
    caption: Caption,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    logarithmic: bool = False,
) -> str:
    """Draw lines. Points that are not finite, or not positive on a logarithmic axis, are left out.

    Parameters
    ----------
    caption : Caption
    series : sequence of Series
        At most four: there are so many colours.
    x_label, y_label : str
    logarithmic : bool
        The y axis.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    shown = [Series(s.name, [p for p in s.points if _drawable(p, logarithmic)]) for s in series]
    ys = [y for each in shown for _, y in each.points] or [1.0]
    xs = [x for each in shown for x, _ in each.points] or [0.0]
    ticks = _log_ticks(min(ys), max(ys)) if logarithmic else _ticks(min(ys), max(ys))
    scale = math.log10 if logarithmic else float
    low, high = scale(min(ticks[0], *ys)), scale(max(ticks[-1], *ys))
    left, right = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (scale(y) - low) / (high - low)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )

    svg = _svg(caption, HEIGHT)
    for tick in ticks:
        y = place(left, tick)[1]
        _line(svg, "grid", _LEFT, y, WIDTH - _RIGHT, y)
        _text(svg, _LEFT - 8, y + 4, f"{tick:.6g}", anchor="end")
    for tick in _whole_ticks(left, right):
        x = place(tick, ys[0])[0]
        _text(svg, x, HEIGHT - _BOTTOM + 18, f"{tick:g}", anchor="middle")
    _text(svg, (WIDTH + _LEFT - _RIGHT) / 2, HEIGHT - 6, x_label, anchor="middle")
    _text(svg, 0, 14, y_label)
    for index, each in enumerate(shown, 1):
        _draw_line(svg, each, index, place, x_label)
    _legend(svg, [each.name for each in shown])
    return _markup(svg)


def heat_map(
    caption: Caption,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float],
    column_label: str,
    text: Text,
) -> str:
    """Draw a table as cells, the darker the larger the value, from the least to the greatest.

    Parameters
    ----------
    caption : Caption
    rows, columns : sequence of str
    values : mapping of (row, column) to float
        Cells that it lacks stay empty.
    column_label : str
    text : callable
        Writes a value.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    low, high = min(values.values()), max(values.values())
    height = _TOP + len(rows) * _CELL_HEIGHT + _BOTTOM
    svg = _svg(caption, height)
    flat = text(low) == text(high)  # rounding alone should not make a pattern
    _text(svg, 0, 14, text(low) if flat else f"{text(low)} (faint) to {text(high)} (full)")
    width = (WIDTH - _LABEL_WIDTH - _RIGHT) / max(len(columns), 1)
    every = math.ceil(len(columns) / 20)
    for line, row in enumerate(rows):
        y = _TOP + line * _CELL_HEIGHT
        _text(svg, _LABEL_WIDTH - 8, y + 15, _cut(row), anchor="end")
        for place, column in enumerate(columns):
            value = values.get((row, column))
            if value is None:
                continue
            share = 0.5 if flat else (value - low) / (high - low)
            x, gap = _LABEL_WIDTH + place * width, min(1.5, width / 8)
            cell = _rect(svg, "cell", x, y, width - gap, _CELL_HEIGHT - gap)
            cell.set("fill-opacity", f"{_FAINTEST + (1 - _FAINTEST) * share:.3f}")
            _tip(cell, f"{column_label} {column}, {row}: {text(value)}")
    for place, column in enumerate(columns):
        if place % every == 0:
            x = _LABEL_WIDTH + (place + 0.5) * width
            _text(svg, x, height - _BOTTOM + 16, column, anchor="middle")
    _text(svg, (WIDTH + _LABEL_WIDTH) / 2, height - 6, column_label, anchor="middle")
    return _markup(svg)


def bar_chart(caption: Caption, bars: Sequence[tuple[str, float]], text: Text) -> str:
    """Draw horizontal bars from 0, each with its value.

    Parameters
    ----------
    caption : Caption
    bars : sequence of (str, float)
        Labels and lengths, not negative.
    text : callable
        Writes a length.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    svg = _svg(caption, len(bars) * _BAR_HEIGHT + 8)
    longest = max((length for _, length in bars), default=0.0) or 1.0
    room = WIDTH - _LABEL_WIDTH - 110
    for line, (label, length) in enumerate(bars):
        y = 4 + line * _BAR_HEIGHT
        _text(svg, _LABEL_WIDTH - 8, y + 16, _cut(label), anchor="end")
        bar = _rect(svg, "bar", _LABEL_WIDTH, y + 3, max(length / longest * room, 1), 18)
        _tip(bar, f"{label}: {text(length)}")
        _text(svg, _LABEL_WIDTH + length / longest * room + 8, y + 16, text(length))
    return _markup(svg)


def _draw_line(
    svg: Element,
    series: Series,
    index: int,
    place: Callable[[float, float], tuple[float, float]],
    x_label: str,
) -> None:
    at = [place(*point) for point in series.points]
    if len(at) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        SubElement(svg, "polyline", {"class": f"line s{index}", "points": path})
    if len(at) > _MARKED_POINTS:
        return
    for (x, y), (given, value) in zip(at, series.points, strict=True):
        attributes = {"class": f"dot s{index}", "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3"}
        dot = SubElement(svg, "circle", attributes)
        _tip(dot, f"{series.name}, {x_label} {given:g}: {value:.4g}")


def _legend(svg: Element, names: Sequence[str]) -> None:
    x = WIDTH - _RIGHT - sum(7 * len(name) + 42 for name in names)
    for index, name in enumerate(names, 1):
        _line(svg, f"line s{index}", x, 10, x + 22, 10)
        _text(svg, x + 28, 14, name)
        x += 7 * len(name) + 42


def _svg(caption: Caption, height: float) -> Element:
    names = [f"{caption.ident}-title", f"{caption.ident}-text"]
    box = {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "aria-labelledby": " ".join(names)}
    svg = Element("svg", box)
    SubElement(svg, "title", {"id": names[0]}).text = caption.title
    SubElement(svg, "desc", {"id": names[1]}).text = caption.description
    return svg


def _text(svg: Element, x: float, y: float, text: str, *, anchor: str = "start") -> None:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    SubElement(svg, "text", attributes).text = text


def _line(svg: Element, style: str, x1: float, y1: float, x2: float, y2: float) -> None:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    SubElement(svg, "line", {"class": style, **{key: f"{v:.1f}" for key, v in ends.items()}})


def _rect(svg: Element, style: str, x: float, y: float, width: float, height: float) -> Element:
    size = {"x": x, "y": y, "width": width, "height": height}
    return SubElement(svg, "rect", {"class": style, **{k: f"{v:.2f}" for k, v in size.items()}})


def _tip(element: Element, text: str) -> None:
    SubElement(element, "title").text = text


def _markup(svg: Element) -> str:
    # XML cannot hold control characters, not even escaped; HTML should not.
    text = ElementTree.tostring(svg, encoding="unicode")
    return "".join(c for c in text if c >= " " or c == "\n")


def _cut(label: str) -> str:
    return label if len(label) <= 28 else f"{label[:27]}…"


def _drawable(point: tuple[float, float], logarithmic: bool) -> bool:
    return all(map(math.isfinite, point)) and (not logarithmic or point[1] > 0)


def _ticks(low: float, high: float, count: int = _TICKS) -> list[float]:
    """Return round numbers from at most `low` to at least `high`."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _whole_ticks(low: float, high: float) -> list[float]:
    """Return round whole numbers between `low` and `high`."""
    return sorted({round(tick) for tick in _ticks(low, high, 10) if low <= round(tick) <= high})


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten around `low` and `high`, or 1-2-5 steps if there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, max(last, first + 1) + 1)
    if len(powers) > _LOG_POWERS:
        return [10.0**power for power in powers[:: math.ceil(len(powers) / 8)]]
    steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    before = max((step for step in steps if step <= low), default=steps[0])
    after = min((step for step in steps if step >= high and step > before), default=steps[-1])
    return [step for step in steps if before <= step <= after]
