"""`gqsa bench`: tokens a second, and the share of this machine's memory bandwidth."""

from __future__ import annotations

from typing import Annotated

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import emit_json, progress, show_settings
from gqsa_compiler.cli.paths import require_artefact
from gqsa_compiler.units import bytes_text


@command
def bench(
    directory: options.Artefact,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    gen: Annotated[int, typer.Option(min=2, help="Tokens to generate after it.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs, after one that is not.")] = 5,
    threads: options.Threads = None,
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
            "threads": threads,
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
    ):
        print(f"{name:<13}{value}")
