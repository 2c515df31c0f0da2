"""The report that `gqsa compile` ends with."""

from __future__ import annotations

from typing import Any

from gqsa_compiler.cli.console import counted, emit_table
from gqsa_compiler.units import bytes_text, seconds_text

_KINDS = {
    "compressed": "compressed layers",
    "head": "head, rounded to 8 bits",
    "dense_linear": "dense linear layers",
    "tables": "embedding and RoPE tables",
    "other": "norms, biases",
    "adapters": "LoRA adapters",
}
_SOURCES = {
    "exact": "measured",
    "nearest": "measured for the nearest shape",
    "default": "by default",
}
# A fallback list longer than this is cut: its first lines and the count say it.
_SHOWN = 8


def print_report(report: dict[str, Any]) -> None:
    """Print a compile report (`CompileReport.to_dict`) on standard output."""
    from rich.table import Table

    kinds = report["bytes_by_kind"]
    total = sum(kinds.values())
    table = Table("weights", box=None)
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for kind, count in kinds.items():
        if not count and kind != "compressed":
            continue
        share = count / total if total else 0.0
        table.add_row(_KINDS.get(kind, kind), bytes_text(count), f"{share:.1%}")
    table.add_row("all", bytes_text(total), "")
    emit_table(table)
    if report["bits_per_weight"]:
        print(f"\nbits a weight of the compressed layers, packed   {report['bits_per_weight']:.3f}")
    if report["kv_cache_bytes_per_token"]:  # not so for a module
        print(
            f"read to decode a token   {bytes_text(report['bytes_per_token'])}\n"
            f"KV cache                 {bytes_text(report['kv_cache_bytes_per_token'])} a token, "
            f"{report['kv_cache_dtype']}"
        )
    print(f"workspace                {bytes_text(report['workspace_bytes'])}\n")
    _print_kernels(report)
    _print_fallbacks(report["fallbacks"])
    seconds = report["seconds"]
    print("time: " + ", ".join(f"{stage} {seconds_text(s)}" for stage, s in seconds.items()))


def _print_kernels(report: dict[str, Any]) -> None:
    from rich.table import Table

    read: dict[str, int] = {}
    for use in report["kernels"]:
        read[use["kernel"]] = read.get(use["kernel"], 0) + use["bytes"]
    table = Table("kernel", box=None)
    table.add_column("layers", justify="right")
    table.add_column("bytes", justify="right")
    for kernel, count in report["kernel_counts"].items():
        table.add_row(kernel, str(count), bytes_text(read.get(kernel, 0)))
    emit_table(table)
    print()
    sources = report["configuration_sources"]
    if set(sources) - {"default"}:
        named = ", ".join(f"{count} {_SOURCES[source]}" for source, count in sources.items())
        print(f"configurations: {named}\n")


def _print_fallbacks(fallbacks: list[dict[str, Any]]) -> None:
    if not fallbacks:
        print("Nothing fell back.\n")
        return
    extra = sum(entry["extra_bytes"] for entry in fallbacks)
    print(
        f"{counted(len(fallbacks), 'linear layer')} stayed dense "
        f"and cost {bytes_text(extra)} more a token than compressed:"
    )
    for entry in fallbacks[:_SHOWN]:
        print(
            f"  {entry['layer']}: {entry['reason']}; {bytes_text(entry['bytes'])}, "
            f"{bytes_text(entry['extra_bytes'])} more"
        )
    if len(fallbacks) > _SHOWN:
        print(f"  and {len(fallbacks) - _SHOWN} more (--json lists them all)")
    print()
