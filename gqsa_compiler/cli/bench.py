"""`gqsa bench`: tokens a second, and the share of this machine's memory bandwidth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import emit_json, emit_table, note, progress, show_settings
from gqsa_compiler.cli.paths import require_artefact
from gqsa_compiler.units import bytes_text

if TYPE_CHECKING:
    from gqsa_compiler.profile import PhaseProfile


@command
def bench(
    directory: options.Artefact,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    gen: Annotated[int, typer.Option(min=2, help="Tokens to generate after it.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs, after one that is not.")] = 5,
    adapter: options.Adapter = None,
    threads: options.Threads = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also print where the time goes, by kernel.")
    ] = False,
    variant: options.Variant = None,
    no_verify: options.NoVerify = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure prefill and decode speed, the bytes a token reads, and peak memory."""
    require_artefact(directory)
    show_settings(
        "bench",
        {
            "artefact": directory,
            "prompt": f"{prompt} tokens",
            "gen": f"{gen} tokens",
            "repeats": repeats,
            "adapter": adapter,
            "threads": threads,
            "variant": variant,
            "profile": profile or None,
        },
    )
    from gqsa_compiler.bench import bench_artefact

    with progress() as report_progress:
        result = bench_artefact(
            directory,
            prompt=prompt,
            gen=gen,
            repeats=repeats,
            threads=threads,
            verify=not no_verify,
            profile=profile,
            adapter=adapter,
            variant=variant,
            progress=report_progress,
        )
    if json:
        emit_json(result.to_dict())
        return
    share = f"{result.read_bandwidth_share:.0%} of {bytes_text(result.read_bandwidth)}/s"
    rate = bytes_text(result.bytes_per_token * result.decode_tokens_per_second)
    for name, value in (
        ("prefill", f"{result.prefill_tokens_per_second:.1f} tokens/s"),
        ("decode", f"{result.decode_tokens_per_second:.1f} tokens/s"),
        ("first token", f"{result.first_token_seconds * 1000:.0f} ms"),
        ("read a token", bytes_text(result.bytes_per_token)),
        ("read rate", f"{rate}/s ({share} measured here)"),
        ("peak memory", bytes_text(result.peak_memory_bytes)),
        ("threads", str(result.threads)),
        ("code for", result.variant),
    ):
        print(f"{name:<13}{value}")
    if result.profile is not None:
        _print_phase("a decoded token", result.profile.decode)
        _print_phase(f"a prompt of {result.prompt} tokens", result.profile.prefill)


def _print_phase(what: str, phase: PhaseProfile) -> None:
    from rich.table import Table

    rates = any(line.bytes_per_second is not None for line in phase.lines)
    table = Table(what, "kernel", box=None)
    for heading in ("sparsity", "calls", "us", "share", "GB/s")[: 5 if rates else 4]:
        table.add_column(heading, justify="right")
    for line in phase.lines:
        rate = line.bytes_per_second
        cells = [
            line.name if line.n is None else f"{line.name} {line.n} x {line.k}",
            line.kernel or "",
            f"{line.sparsity:.0%}" if line.sparsity else "",
            "" if line.kind == "rest" else f"{line.calls:g}",
            f"{line.microseconds:.1f}",
            f"{line.share:.1%}",
            "" if rate is None else f"{rate / 1e9:.2f}",
        ]
        table.add_row(*cells[: 7 if rates else 6])
    table.add_row("all, not profiled", "", "", "", f"{phase.microseconds:.1f}", f"{1:.1%}")
    print()
    emit_table(table)
    more = phase.profiled_microseconds / phase.microseconds - 1
    print(f"(profiled: {phase.profiled_microseconds:.1f} us, {more:+.0%})")
    if phase.lines[-1].microseconds < 0:
        note("The kernels' times exceed the unprofiled time: the machine is busy with other work.")
