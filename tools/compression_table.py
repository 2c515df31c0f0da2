"""Perplexity against stored bits: compress one model by many recipes, all trained alike.

Each recipe is compressed with `gqsa compress` and scored with `gqsa eval`; what is done is kept in
a JSON-lines file, so that an interrupted run goes on. At the end: a Markdown table and a plot
(which needs `pip install matplotlib`).

    python tools/compression_table.py --calibration train.txt --text held-out.txt
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from commands import measure

RECIPES = (
    *(f"w4s{sparsity}g{group}" for sparsity in (50, 30, 0) for group in (16, 32, 64)),
    "baseline/gptq-w2g64",
    "baseline/gptq-w3g64",  # 128 does not divide SmolLM2's 576 inputs
    "baseline/2of4-w4g64",
)
STAGES = "block,weights,scales"


def compress(recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress by one recipe and score the checkpoint."""
    place = arguments.directory / recipe.replace("/", "-")
    settings = place.with_suffix(".yaml")
    settings.write_text(
        f"base: {recipe}\n"
        # All with one head: what is compared is the blocks.
        "head: null\n"
        f"block: {{epochs: {arguments.block_epochs}, samples: {arguments.block_samples}}}\n"
        f"weights: {{epochs: {arguments.weight_epochs}}}\n"
        f"scales: {{epochs: {arguments.scale_epochs}}}\n",
        encoding="utf-8",
    )
    calibration = ["--calibration", str(arguments.calibration)] if arguments.calibration else []
    size = ["--samples", arguments.samples, "--sequence-length", str(arguments.context)]
    began = time.monotonic()
    report = measure(
        *("compress", arguments.model, "-o", str(place), "--recipe", str(settings)),
        *("--stages", STAGES, "--overwrite", *calibration, *size),
    )
    seconds = time.monotonic() - began
    score = measure(
        *("eval", str(place), "--text", str(arguments.text), "--context", str(arguments.context))
    )
    return {
        "recipe": recipe,
        "bits": report["nominal_bits_per_weight"] or report["bits_per_weight"],
        "stored_bits": report["bits_per_weight"],
        "divergence": report["divergence"],
        "perplexity": score["perplexity"],
        "perplexity_stderr": score["perplexity_stderr"],
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]], dense: float) -> str:
    """Return the results as a Markdown table, fewest bits first."""
    lines = [
        "| recipe | bits a weight | perplexity | times dense | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["bits"]):
        cells = (
            row["recipe"],
            f"{row['bits']:.2f}",
            f"{row['perplexity']:.2f} ± {row['perplexity_stderr']:.2f}",
            f"{row['perplexity'] / dense:.2f}",
            f"{row['seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], dense: float, target: Path) -> None:
    """Draw perplexity (log scale) against bits, a line for each group size."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.6))
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        baseline = row["recipe"].startswith("baseline/")
        key = "baselines" if baseline else f"GQSA W4, groups of {row['recipe'].split('g')[-1]}"
        families.setdefault(key, []).append(row)
    for name, members in families.items():
        members.sort(key=lambda row: row["bits"])
        style = "s" if name == "baselines" else "o-"
        axes.plot(
            [row["bits"] for row in members],
            [row["perplexity"] for row in members],
            style,
            label=name,
        )
        for row in members:
            label = row["recipe"].removeprefix("baseline/")
            axes.annotate(
                label,
                (row["bits"], row["perplexity"]),
                textcoords="offset points",
                xytext=(5, 5),
                fontsize=7,
            )
    axes.axhline(dense, color="grey", linewidth=1, linestyle="--", label="dense")
    axes.set(xlabel="stored bits a weight", ylabel="perplexity", yscale="log")
    axes.margins(x=0.1)
    axes.minorticks_off()
    axes.yaxis.get_major_locator().set_params(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(target)


def main() -> None:
    """Measure what is not measured yet, then print and draw everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", type=Path, help="default: the model's own text")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--directory", type=Path, default=Path("out/compression"))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--samples", default="128")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--block-samples", type=int, default=64)
    parser.add_argument("--block-epochs", type=float, default=1.0)
    parser.add_argument("--weight-epochs", type=float, default=1.0)
    parser.add_argument("--scale-epochs", type=float, default=0.25)
    arguments = parser.parse_args()
    if find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install matplotlib")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    log = arguments.directory / "results.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {row["recipe"] for row in rows}
    for recipe in arguments.recipes:
        if recipe not in done:
            rows.append(compress(recipe, arguments))
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    score = ("eval", arguments.model, "--text", str(arguments.text))
    dense = measure(*score, "--context", str(arguments.context))["perplexity"]
    print(f"\ndense {dense:.2f}\n\n{table(rows, dense)}")
    plot(rows, dense, arguments.directory / "perplexity.svg")


if __name__ == "__main__":
    main()
