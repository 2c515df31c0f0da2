"""How decoding speed follows the context, the sparsity and the batch, and a roofline of kernels.

    python tools/bench_scaling.py --directory out/scaling
    python tools/bench_scaling.py --directory out/1b --shape llama-3.2-1b --only sparsity,roofline

Everything is measured on this machine, with random weights that are made and compiled on the way
(`--artefact` names a compiled model for all but the sparsity). Each part writes a JSON file and an
SVG plot, and the JSON file grows round by round: an interrupted run goes on, and more `--repeats`
add rounds. The artefacts stay in DIRECTORY/artefacts; delete them after a change of the compiler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from llamacpp_timing import positive
from random_checkpoint import sparsity
from scaling_parts import BATCH, CONTEXT, SPARSITY
from scaling_plan import Part, Plan
from scaling_plots import draw
from scaling_roofline import ROOFLINE
from scaling_store import Store

from gqsa_compiler.errors import GqsaError
from gqsa_compiler.runtime.cpus import default_threads

T = TypeVar("T", int, float)

PARTS = {part.name: part for part in (CONTEXT, SPARSITY, BATCH, ROOFLINE)}

_FULL: dict[str, Any] = {
    "repeats": 5,
    "steps": 24,
    "contexts": (128, 256, 512, 1024, 2048, 4096, 8192),
    "sparsities": (0.0, 0.2, 0.3, 0.5, 0.65, 0.8),
    "batches": (1, 2, 4, 8, 16, 32, 64),
}
_QUICK: dict[str, Any] = {
    "repeats": 2,
    "steps": 6,
    "contexts": (128, 512, 2048),
    "sparsities": (0.0, 0.5, 0.8),
    "batches": (1, 4, 16, 64),
}


def run_part(part: Part, plan: Plan) -> Store:
    """Measure the rounds that a part still lacks, then draw it.

    Raises
    ------
    GqsaError
        The part cannot be measured, or its file belongs to another run.
    """
    store = Store(part, plan)
    if len(store.rounds) < plan.repeats:
        print(f"{part.name}: preparing", file=sys.stderr)
        with part.prepare(plan) as measurement:
            for index in range(len(store.rounds), plan.repeats):
                store.add(measurement.measure(index), measurement.about)
                print(f"{part.name}: round {index + 1} of {plan.repeats}", file=sys.stderr)
    draw(store.data, store.path.with_suffix(".svg"))
    return store


def summary(store: Store) -> str:
    """Return a part's figures as lines of text."""
    lines = []
    for point in store.result["points"]:
        if "seconds" in point:
            name = next(iter(point))
            spread, ideal = point["seconds"], point["ideal_seconds"]
            text = f"{name} {point[name]:g}: {1e3 * spread['median']:.2f} ms a pass"
            text += f" ({1e3 * spread['low']:.2f} to {1e3 * spread['high']:.2f})"
            lines.append(f"{text}, {1e3 * ideal:.2f} ms at the memory's speed")
        else:
            rate = point["operations_per_second"]["median"] / 1e9
            text = f"{point['phase']} {point['name']}: {rate:.2f} GFLOP/s"
            lines.append(f"{text} at {point['operations_per_byte']:.1f} operations a byte")
    return "\n".join(lines)


def read_command_line(words: Iterable[str] | None = None) -> tuple[list[Part], Plan]:
    """Parse and check the command line; ends the program where it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("out/scaling"))
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--quick", action="store_true", help="few points, passes and rounds")
    parser.add_argument("--shape", default="smollm2-135m", help="of the random weights")
    parser.add_argument("--artefact", type=Path, help="measured instead, but for the sparsity")
    parser.add_argument("--sparsity", type=sparsity, default=0.5, help="of the other parts")
    parser.add_argument("--threads", type=positive, default=default_threads())
    parser.add_argument("--repeats", type=positive, help="rounds of each part")
    parser.add_argument("--steps", type=positive, help="decoding passes of a figure")
    parser.add_argument("--prompt", type=positive, default=128, help="for sparsity and roofline")
    parser.add_argument("--batch-prompt", type=positive, default=32, help="of each sequence")
    parser.add_argument("--contexts", type=_several(positive), metavar="N,N,...")
    parser.add_argument("--sparsities", type=_several(sparsity), metavar="S,S,...")
    parser.add_argument("--batches", type=_several(positive), metavar="N,N,...")
    parser.add_argument("--peak", type=float, metavar="GFLOPS", help="instead of measuring it")
    options = parser.parse_args(None if words is None else list(words))
    unknown = [name for name in options.only.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"--only knows {', '.join(PARTS)}, and not {unknown[0]!r}")
    if options.peak is not None and not options.peak > 0:
        parser.error("--peak must be above 0")
    if find_spec("matplotlib") is None:
        parser.error("the plots need matplotlib: pip install matplotlib")
    values = vars(options)
    only, quick = values.pop("only").split(","), values.pop("quick")
    for name, value in (_QUICK if quick else _FULL).items():
        values[name] = value if values[name] is None else values[name]
    if options.peak is not None:
        values["peak"] = options.peak * 1e9
    return [part for name, part in PARTS.items() if name in only], Plan(**values)


def _several(read: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Read a list with commas for argparse; the smallest comes first."""

    def read_list(text: str) -> tuple[T, ...]:
        return tuple(sorted({read(word) for word in text.split(",")}))

    return read_list


def main() -> None:
    """Measure and draw what is not there yet."""
    parts, plan = read_command_line()
    try:
        for part in parts:
            Store(part, plan)  # figures of another run are found before anything is measured
        for part in parts:
            store = run_part(part, plan)
            print(f"{store.path.with_suffix('.svg')}\n{summary(store)}\n")
    except GqsaError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on after the last round that was finished.")


if __name__ == "__main__":
    main()
