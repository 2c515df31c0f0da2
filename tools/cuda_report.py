"""Turns the JSON of `cuda_run.py` into Markdown tables for docs/benchmarks.md, and plots.

python tools/cuda_report.py cuda-results.json --plots docs/images
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DENSE_4_BIT = ("torch-int4-g32", "torch-int4-g128", "gemlite-w4-g16", "gemlite-w4-g128")
GOALS = {
    "bandwidth": 0.80,
    "dense 4-bit": 1.3,
    "cuBLAS": 4.0,
    "2:4": 2.35,
    "W2": 1.26,
    "model": 3.7,
}
"""What a token of W4S50 is to reach: a share of the copy's bandwidth, and ratios of time."""


@dataclass(frozen=True)
class Point:
    """A measured or failed case.

    Parameters
    ----------
    kernel : str
        This project's kernel, or a rival's name.
    variant, activations : str
        Of this project's kernels; empty for rivals.
    seconds, bandwidth : float
        Of one call, if it was timed; else 0.
    """

    shape: str
    kernel: str
    variant: str
    activations: str
    sparsity: float
    tokens: int
    status: str
    fault: str
    seconds: float
    bandwidth: float


def points(data: Mapping[str, Any]) -> list[Point]:
    """Read all cases of this project's kernels and of rivals."""
    kernels = {kernel["id"]: kernel for kernel in data["kernels"]}
    found = []
    for result in data["results"]:
        name, sparsity, tokens = result["case"].split("|")
        kernel = kernels[name]
        labels = (kernel["variant"], kernel["spec"]["activation_dtype"])
        found.append(_point(kernel["shape"], name, *labels, float(sparsity), int(tokens), result))
    for result in data["rivals"]:
        shape, name, tokens = result["case"].split("|")
        found.append(_point(shape, name, "", "", 0.0, int(tokens), result))
    return found


def _point(
    shape: str,
    kernel: str,
    variant: str,
    activations: str,
    sparsity: float,
    tokens: int,
    result: Mapping[str, Any],
) -> Point:
    seconds = result["timing"]["median"] if "timing" in result else 0.0
    return Point(
        shape,
        kernel,
        variant,
        activations,
        sparsity,
        tokens,
        result["status"],
        result.get("fault", ""),
        seconds,
        result.get("bandwidth", 0.0),
    )


@dataclass(frozen=True)
class Report:
    """The tables of one run."""

    data: Mapping[str, Any]
    points: Sequence[Point]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Report:
        """Read a run's results."""
        return cls(data, points(data))

    @property
    def shapes(self) -> list[str]:
        """The shapes in the bundle's order."""
        return [shape["name"] for shape in self.data["shapes"]]

    def best(self, shape: str, tokens: int, sparsity: float, **fields: str) -> Point | None:
        """Return the fastest of this project's plain kernels, or None."""
        chosen = [
            p
            for p in self.points
            if p.shape == shape and p.tokens == tokens and p.sparsity == sparsity
            if p.seconds and p.variant in ("default", "sweep")
            if all(getattr(p, name) == value for name, value in fields.items())
        ]
        return min(chosen, key=lambda p: p.seconds, default=None)

    def rival(self, shape: str, tokens: int, names: Sequence[str]) -> Point | None:
        """Return the fastest of these rivals, or None."""
        chosen = [
            p
            for p in self.points
            if p.shape == shape and p.tokens == tokens and p.kernel in names and p.seconds
        ]
        return min(chosen, key=lambda p: p.seconds, default=None)

    def markdown(self) -> str:
        """Write everything."""
        parts = [self.head(), self.goals(), self.models(), self.tokens(), self.sparsities()]
        parts.append(self.sweep())
        return "\n\n".join([*parts, self.faults()]) + "\n"

    def head(self) -> str:
        """Say what was measured on what."""
        device, bundle = self.data["device"], self.data["bundle"]
        timed = sum(1 for p in self.points if p.seconds)
        return (
            f"{device['name']} ({device['arch']}, {device['processors']} processors, "
            f"{device['l2_bytes'] / 1e6:.0f} MB of L2), driver {device.get('driver', 'unknown')}, "
            f"{self.data['date'][:10]}; kernels built {bundle['built'][:10]} by "
            f"gqsa-compiler {bundle['versions']['gqsa-compiler']}. A copy on the device moves "
            f"{device['copy_bandwidth'] / 1e9:.0f} GB/s, read and written. Medians of graph "
            f"replays over more than 160 MB of weights; {timed} of {len(self.points)} cases timed."
        )

    def goals(self) -> str:
        """Compare one token of W4S50 with the goals."""
        copy = self.data["device"]["copy_bandwidth"]
        rows = [
            "One token, half of the groups dropped; times of rivals over ours (goal).",
            "",
            "| layer | kernel | µs | GB/s | of the copy ("
            + f"{GOALS['bandwidth']:.0%}) | cuBLAS fp16 ({GOALS['cuBLAS']:g}) | best dense 4-bit "
            + f"({GOALS['dense 4-bit']:g}) | 2:4 fp16 ({GOALS['2:4']:g}) | W2 g64 "
            + f"({GOALS['W2']:g}) |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for shape in self.shapes:
            own = self.best(shape, 1, 0.5)
            if own is None:
                continue
            cells = [shape, own.kernel.removeprefix(f"{shape}-"), f"{own.seconds * 1e6:.2f}"]
            cells += [f"{own.bandwidth / 1e9:.0f}", f"{own.bandwidth / copy:.0%}"]
            groups = (["cublas-fp16"], DENSE_4_BIT, ["cusparselt-2:4-fp16"], ["gemlite-w2-g64"])
            for names in groups:
                other = self.rival(shape, 1, names)
                if other is None:
                    cells.append("not measured")
                else:
                    ratio = f"{other.seconds / own.seconds:.2f}"
                    cells.append(ratio if len(names) == 1 else f"{ratio} ({other.kernel})")
            rows.append("| " + " | ".join(cells) + " |")
        return "\n".join(rows)

    def models(self) -> str:
        """Hold our linear layers' times against dense models, whole, under torch.compile."""
        rows = [
            f"A token of a dense float16 model under torch.compile with CUDA graphs (goal: "
            f"{GOALS['model']:g} times ours), and the sum of our linear layers of its blocks, half",
            "of the groups dropped: attention, the head and what lies between are not in it.",
            "",
            "| model | context | dense, ms | our linear layers, ms |",
            "|---|---|---|---|",
        ]
        for result in self.data["models"]:
            name, _, context = result["case"].split("|")
            if result["status"] != "ok":
                rows.append(f"| {name} | {context} | {result['status']}: {result['fault']} | |")
                continue
            dense = self.data["dense_models"][name]
            own = [self.best(shape, 1, 0.5) for shape in dense["linears"]]
            each = sum(p.seconds for p in own if p is not None)
            total = each * dense["shape"]["layers"] * 1e3
            ours = f"{total:.3f}" if all(own) else "not all measured"
            rows.append(f"| {name} | {context} | {result['timing']['median'] * 1e3:.3f} | {ours} |")
        return "\n".join(rows)

    def tokens(self) -> str:
        """List times against the number of tokens, of the default configurations."""
        counts = sorted({p.tokens for p in self.points})
        rows = ["Microseconds against the number of tokens, half of the groups dropped.", ""]
        rows.append("| layer | kernel | " + " | ".join(str(count) for count in counts) + " |")
        rows.append("|---|---|" + "---|" * len(counts))
        for shape in self.shapes:
            for label, select in self._series():
                times = [select(shape, count) for count in counts]
                if any(times):
                    cells = [f"{p.seconds * 1e6:.1f}" if p else "" for p in times]
                    rows.append(f"| {shape} | {label} | " + " | ".join(cells) + " |")
        return "\n".join(rows)

    def _series(self) -> Iterator[tuple[str, Any]]:
        for dtype in ("int16", "float16"):
            yield (
                f"ours, {dtype}",
                lambda shape, tokens, dtype=dtype: self.best(
                    shape, tokens, 0.5, variant="default", activations=dtype
                ),
            )
        for name in sorted({p.kernel for p in self.points if not p.activations}):
            yield name, lambda shape, tokens, name=name: self.rival(shape, tokens, [name])

    def sparsities(self) -> str:
        """List times of one token against the share of groups dropped, beside dense ones."""
        dropped = sorted({p.sparsity for p in self.points if p.variant == "default"})
        rows = ["Microseconds of one token against the share of groups dropped (G = 16), beside"]
        rows += ["all groups kept in the same stack: 4 bits with G = 128, 2 bits with G = 64.", ""]
        shares = " | ".join(f"{s:g}" for s in dropped)
        rows.append(f"| layer | {shares} | W4 G = 128 | W2 G = 64 |")
        rows.append("|---|" + "---|" * (len(dropped) + 2))
        for shape in self.shapes:
            own = [self.best(shape, 1, s, variant="default") for s in dropped]
            if any(own):
                dense = (self._dense(shape, variant) for variant in ("dense-g128", "dense-w2-g64"))
                cells = [f"{p.seconds * 1e6:.2f}" if p else "" for p in (*own, *dense)]
                rows.append(f"| {shape} | " + " | ".join(cells) + " |")
        return "\n".join(rows)

    def _dense(self, shape: str, variant: str) -> Point | None:
        """Return the fastest kernel for one token of a variant that keeps all groups."""
        chosen = [
            p
            for p in self.points
            if p.shape == shape and p.variant == variant and p.tokens == 1 and p.seconds
        ]
        return min(chosen, key=lambda p: p.seconds, default=None)

    def sweep(self, most: int = 5) -> str:
        """List the fastest configurations of each swept shape."""
        rows = [
            "Configurations, one token, half of the groups dropped: the fastest, and the default."
        ]
        rows += ["", "| layer | kernel | µs | GB/s |", "|---|---|---|---|"]
        for shape in self.shapes:
            timed = sorted(
                (
                    p
                    for p in self.points
                    if p.shape == shape and p.tokens == 1 and p.sparsity == 0.5 and p.seconds
                    if p.variant in ("default", "sweep")
                ),
                key=lambda p: p.seconds,
            )
            if not any(p.variant == "sweep" for p in timed):
                continue
            for p in [*timed[:most], *(p for p in timed[most:] if p.variant == "default")]:
                name = p.kernel.removeprefix(f"{shape}-")
                rows.append(
                    f"| {shape} | {name} | {p.seconds * 1e6:.2f} | {p.bandwidth / 1e9:.0f} |"
                )
        return "\n".join(rows)

    def faults(self) -> str:
        """List what is wrong, has failed or was not measured."""
        rows = []
        for p in self.points:
            if p.status in ("wrong", "failed", "crashed"):
                rows.append(
                    f"- {p.status}: {p.kernel}, {p.shape}, {p.sparsity:g}, {p.tokens}: {p.fault}"
                )
        skipped: dict[tuple[str, str], int] = {}
        for p in self.points:
            if p.status == "skipped":
                name = p.kernel if not p.activations else "own kernels"
                skipped[name, p.fault] = skipped.get((name, p.fault), 0) + 1
        rows += [
            f"- skipped: {name}, {count} cases: {why}" for (name, why), count in skipped.items()
        ]
        rows += [f"- not begun: {one['group']}: {one['reason']}" for one in self.data["skipped"]]
        return "\n".join(["Not right or not measured:", "", *rows]) if rows else "All were right."

    def draw(self, folder: Path) -> list[Path]:
        """Draw the plots (needs matplotlib); returns the files."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        folder.mkdir(parents=True, exist_ok=True)
        written = []
        shapes = [shape for shape in self.shapes if self.best(shape, 1, 0.5)]
        figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
        series = [(label, select) for label, select in self._series()]
        width = 0.8 / max(1, len(series))
        for i, (label, select) in enumerate(series):
            speeds = [(p.bandwidth / 1e9 if (p := select(shape, 1)) else 0.0) for shape in shapes]
            axes.bar([x + i * width for x in range(len(shapes))], speeds, width, label=label)
        axes.axhline(self.data["device"]["copy_bandwidth"] / 1e9, color="black", lw=0.8, ls="--")
        axes.set_xticks([x + 0.4 for x in range(len(shapes))], shapes, rotation=30, ha="right")
        axes.set_ylabel("GB/s of weights, one token")
        axes.legend(fontsize=7, ncols=3)
        written.append(folder / "cuda-bandwidth.svg")
        figure.savefig(written[-1])
        pyplot.close(figure)
        goals = [shape for shape in shapes if shape in self.data["goals"]]
        counts = sorted({p.tokens for p in self.points})
        figure, grid = pyplot.subplots(
            1, max(1, len(goals)), figsize=(3.2 * max(1, len(goals)), 3.4), layout="constrained",
            squeeze=False, sharey=True,
        )  # fmt: skip
        for place, shape in zip(grid[0], goals, strict=False):
            for label, select in series:
                found = [(c, p.seconds * 1e6) for c in counts if (p := select(shape, c))]
                if found:
                    place.plot(*zip(*found, strict=True), marker=".", label=label)
            place.set(xscale="log", yscale="log", title=shape, xlabel="tokens")
        grid[0][0].set_ylabel("µs")
        grid[0][-1].legend(fontsize=6)
        written.append(folder / "cuda-tokens.svg")
        figure.savefig(written[-1])
        pyplot.close(figure)
        return written


def main() -> int:
    """Print the tables; draw the plots if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what cuda_run.py has written")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw plots there (matplotlib)")
    options = parser.parse_args()
    report = Report.of(json.loads(options.results.read_text(encoding="utf-8")))
    print(report.markdown(), end="")
    if options.plots is not None:
        report.draw(options.plots)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
