"""What `bench_llamacpp.py` reports: medians, paired ratios, the machine, a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from machine import describe

from gqsa_compiler.units import bytes_text

Run = dict[str, Any]

RATES = ("decode_tokens_per_second", "prefill_tokens_per_second")


@dataclass(frozen=True)
class Contender:
    """One side of a match.

    Parameters
    ----------
    label, path : str
    bytes_per_token : int
        Weight bytes that decoding one token reads.
    command : tuple of str
        Measures once and prints a JSON object.
    """

    label: str
    path: str
    bytes_per_token: int
    command: tuple[str, ...]


def summary(
    name: str,
    sides: Sequence[Contender],
    runs: Sequence[Sequence[Run]],
    bandwidths: Sequence[float],
) -> dict[str, Any]:
    """Sum up a match.

    Parameters
    ----------
    name : str
        The model's.
    sides : sequence of Contender
        Ours, then llama.cpp.
    runs : sequence of sequences
        Those of every side in order. llama.cpp has one after each of ours: run
        ``repeat * len(ours) + index``.
    bandwidths : sequence of float
        Bytes a second, measured in each repeat.

    Returns
    -------
    dict
        ``read_bandwidth`` and, for each side under its label, medians, ``bytes_per_token``,
        ``read_bandwidth_share``, all runs, and for ours ``<rate>_ratio`` against llama.cpp.
    """
    *ours, theirs = sides
    bandwidth = statistics.median(bandwidths)
    results: dict[str, Any] = {}
    for index, side in enumerate(sides):
        found: dict[str, Any] = {
            "path": side.path,
            **{rate: statistics.median(run[rate] for run in runs[index]) for rate in RATES},
            "bytes_per_token": side.bytes_per_token,
        }
        found["read_bandwidth_share"] = side.bytes_per_token * found[RATES[0]] / bandwidth
        if side is not theirs:
            neighbours = runs[-1][index :: len(ours)]
            for rate in RATES:
                pairs = zip(runs[index], neighbours, strict=True)
                ratio = statistics.median(mine[rate] / other[rate] for mine, other in pairs)
                found[f"{rate.split('_')[0]}_ratio"] = ratio
        results[side.label] = {**found, "runs": list(runs[index])}
    return {
        "model": name,
        "read_bandwidth": bandwidth,
        "read_bandwidths": list(bandwidths),
        "results": results,
    }


def machine(llama: dict[str, str]) -> dict[str, Any]:
    """Describe this machine and what runs on it.

    Parameters
    ----------
    llama : dict
        What llama.cpp's side says of itself.
    """
    return {**describe(), "llama.cpp": llama}


def table(result: dict[str, Any]) -> str:
    """Write the results as Markdown: a line on the machine, one on the work, one a side."""
    about, work = result["machine"], result["settings"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores, {about['system']}, {about['date'][:10]}; "
        f"gqsa-compiler {about['versions']['gqsa-compiler']}, "
        f"llama-cpp-python {about['llama.cpp']['llama_cpp_python']}.",
        f"{work['threads']} threads; decode of {work['gen']} tokens after {work['prompt']}, "
        f"prefill of {work['prefill']}; medians of {work['repeats']} repeats, ratios paired.",
    ]
    if about["environment"]:
        lines.append(f"Environment: {about['environment']}.")
    lines += [
        "",
        "| model | | decode, tokens/s | ratio | read a token | share of bandwidth "
        "| prefill, tokens/s | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in result["models"]:
        for label, found in model["results"].items():
            cells = (
                model["model"],
                label,
                f"{found['decode_tokens_per_second']:.1f}",
                _ratio(found.get("decode_ratio")),
                bytes_text(found["bytes_per_token"]),
                f"{found['read_bandwidth_share']:.0%} of {bytes_text(model['read_bandwidth'])}/s",
                f"{found['prefill_tokens_per_second']:.1f}",
                _ratio(found.get("prefill_ratio")),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
