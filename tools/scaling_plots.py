"""Plots of what `bench_scaling.py` has measured: an SVG a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Point = Mapping[str, Any]
Axes = Any

_GAP = 0.045  # between labels, in heights of the plot
_CLUSTER = 2.0  # points that are less than this factor apart have their labels in one column
_CEILINGS = {
    "float32": "float32 multiply-adds",
    "int16": "16-bit dot products",
    "given": "compute peak, as given",
}
_PHASES = {"decode": ("C0", "o"), "prefill": ("C1", "s")}


def draw(data: Mapping[str, Any], target: Path) -> None:
    """Draw a part's figures.

    Parameters
    ----------
    data : mapping
        The part's JSON.
    target : Path
        The SVG file.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = _PANELS[data["part"]]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(7.2 if len(panels) == 1 else 10.4, 4.8), squeeze=False
    )
    for panel, place in zip(panels, axes[0], strict=True):
        panel(place, data)
        place.grid(True, which="both", alpha=0.2)
        corner = "lower right" if panel is _roofline else "best"
        place.legend(frameon=False, fontsize=8, loc=corner)
    about, threads, rounds = data["machine"], data["settings"]["threads"], len(data["rounds"])
    figure.suptitle(
        f"{about['cpu']}, {_count(threads, 'thread')}, {about['date'][:10]}; "
        f"medians and quartiles of {_count(rounds, 'round')}",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(target)
    pyplot.close(figure)


def _measured(
    axes: Axes, xs: Sequence[float], spreads: Sequence[Point], scale: float, label: str, **how: Any
) -> None:
    """Draw medians with their quartiles."""
    middle = [spread["median"] for spread in spreads]
    below = [scale * (m - spread["low"]) for m, spread in zip(middle, spreads, strict=True)]
    above = [scale * (spread["high"] - m) for m, spread in zip(middle, spreads, strict=True)]
    how = {"fmt": "o-", "capsize": 3, "markersize": 4, **how}
    axes.errorbar(xs, [scale * m for m in middle], yerr=(below, above), label=label, **how)


def _milliseconds(axes: Axes, data: Mapping[str, Any], name: str, label: str) -> None:
    """Draw the time of a pass and the least that reading its bytes takes."""
    result = data["result"]
    points = result["points"]
    xs = [point[name] for point in points]
    _measured(axes, xs, [point["seconds"] for point in points], 1e3, label)
    bandwidth = result["read_bandwidth"] / 1e9
    axes.plot(
        xs,
        [1e3 * point["ideal_seconds"] for point in points],
        "--",
        color="grey",
        label=f"its bytes at {bandwidth:.1f} GB/s, as measured",
    )
    axes.set(ylabel="milliseconds", ylim=(0, None))


def _ticks(axes: Axes, xs: Sequence[float]) -> None:
    """Write the measured values, and no others, under a logarithmic axis."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.minorticks_off()


def _context(axes: Axes, data: Mapping[str, Any]) -> None:
    _milliseconds(axes, data, "context", "a decoded token")
    _ticks(axes, [point["context"] for point in data["result"]["points"]])
    axes.set(xlabel="tokens in the context", title=data["about"]["model"])


def _sparsity(axes: Axes, data: Mapping[str, Any]) -> None:
    _milliseconds(axes, data, "sparsity", "a decoded token")
    points = data["result"]["points"]
    first = points[0]
    axes.plot(
        [point["sparsity"] for point in points],
        [1e3 * first["seconds"]["median"] * point["bytes_ratio"] for point in points],
        ":",
        color="C1",
        label=f"time at sparsity {first['sparsity']:g}, scaled by the bytes read",
    )
    shape = data["settings"]["shape"]
    axes.set(xlabel="share of groups dropped", title=f"{shape}, random weights, W4 in groups of 16")


def _batch_time(axes: Axes, data: Mapping[str, Any]) -> None:
    _milliseconds(axes, data, "batch", "a decoding pass")
    _ticks(axes, [point["batch"] for point in data["result"]["points"]])
    axes.set(xlabel="sequences decoded together", title=data["about"]["model"])


def _batch_rate(axes: Axes, data: Mapping[str, Any]) -> None:
    points = data["result"]["points"]
    xs = [point["batch"] for point in points]
    _measured(axes, xs, [point["tokens_per_second"] for point in points], 1, "of all sequences")
    first = points[0]["tokens_per_second"]["median"] / xs[0]
    axes.plot(xs, [first * x for x in xs], "--", color="grey", label="in proportion")
    axes.set_yscale("log", base=10)
    _ticks(axes, xs)
    axes.set(xlabel="sequences decoded together", ylabel="tokens a second")


def _roofline(axes: Axes, data: Mapping[str, Any]) -> None:
    result = data["result"]
    points, bandwidth = result["points"], result["read_bandwidth"]
    peaks = sorted(result["peaks"].items(), key=lambda peak: peak[1])
    highest = peaks[-1][1]
    xs = [point["operations_per_byte"] for point in points]
    left, right = min(xs) / 2, max(*xs, highest / bandwidth) * 2
    ridge = highest / bandwidth
    axes.plot(
        [left, ridge],
        [left * bandwidth / 1e9, highest / 1e9],
        color="black",
        label=f"memory, {bandwidth / 1e9:.1f} GB/s",
    )
    for (kind, peak), style in zip(peaks, ("-", "--"), strict=False):
        label = f"{_CEILINGS.get(kind, kind)}, {peak / 1e9:.0f} GFLOP/s"
        axes.plot([peak / bandwidth, right], [peak / 1e9] * 2, style, color="black", label=label)
    rates = [point["operations_per_second"]["low"] / 1e9 for point in points]
    bottom, top = min(rates) / 2, highest / 1e9 * 1.5
    axes.set(xscale="log", yscale="log", xlim=(left, right * 4), ylim=(bottom, top))
    axes.minorticks_off()
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter("{x:g}")
    for phase, (colour, marker) in _PHASES.items():
        chosen = [point for point in points if point["phase"] == phase]
        if chosen:
            most = max(point["tokens"] for point in chosen)
            places = [point["operations_per_byte"] for point in chosen]
            spreads = [point["operations_per_second"] for point in chosen]
            label = f"{phase}, {_count(most, 'token')}"
            _measured(axes, places, spreads, 1e-9, label, fmt=marker, color=colour)
    for cluster in clusters(points):
        _name(axes, cluster, _GAP * math.log10(top / bottom))
    axes.set(
        xlabel="operations on kept weights for each weight byte read",
        ylabel="GFLOP/s",
        title=data["about"]["model"],
    )


def _name(axes: Axes, cluster: Sequence[Point], gap: float) -> None:
    """Write the names of points in a column on their right."""
    column = max(point["operations_per_byte"] for point in cluster) * 1.35
    rates = [point["operations_per_second"]["median"] / 1e9 for point in cluster]
    for point, rate, height in zip(cluster, rates, apart(rates, gap), strict=True):
        colour = _PHASES[point["phase"]][0]
        axes.annotate(
            f"{point['name']}, {point['phase']}",
            (point["operations_per_byte"], rate),
            xytext=(column, height),
            fontsize=7,
            verticalalignment="center",
            color=colour,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": colour},
        )


def clusters(points: Sequence[Point]) -> list[list[Point]]:
    """Group points that have about as many operations a byte, fewest first."""
    found: list[list[Point]] = []
    last = 0.0
    for point in sorted(points, key=lambda point: point["operations_per_byte"]):
        place = point["operations_per_byte"]
        if not found or place > _CLUSTER * last:
            found.append([])
        found[-1].append(point)
        last = place
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Move positive values upwards until neighbours differ by `gap` powers of ten at least."""
    found = list(values)
    last = -math.inf
    for index in sorted(range(len(values)), key=lambda index: values[index]):
        last = max(math.log10(values[index]), last + gap)
        found[index] = 10**last
    return found


_PANELS: Mapping[str, tuple[Callable[[Axes, Mapping[str, Any]], None], ...]] = {
    "context": (_context,),
    "sparsity": (_sparsity,),
    "batch": (_batch_time, _batch_rate),
    "roofline": (_roofline,),
}
