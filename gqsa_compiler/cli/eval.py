"""`gqsa eval`: perplexity on a text, and divergence from a reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import emit_json, progress, show_settings
from gqsa_compiler.cli.paths import read_text


@command
def eval_(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_DIR",
            help="A model, a GQSA checkpoint or a compiled artefact.",
            show_default=False,
        ),
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 text file to score.", show_default=False)],
    context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens in a window.", show_default="2048, or the model's if less"
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Also measure KL(reference || model) against this model.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score the first windows only.", show_default="all")
    ] = None,
    adapter: options.Adapter = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure perplexity on a text: consecutive windows, the first token of each not scored."""
    content = read_text(text, "--text")
    show_settings(
        "eval",
        {
            "model": model,
            "text": text,
            "context": context or "2048, or the model's if less",
            "reference": reference,
            "limit": limit,
            "adapter": adapter,
            "threads": threads,
        },
    )
    from gqsa_compiler.evaluate import perplexity

    with progress() as report_progress:
        result = perplexity(
            model,
            content,
            context,
            reference=reference,
            limit=limit,
            threads=threads,
            adapter=adapter,
            progress=report_progress,
        )
    if json:
        emit_json(result.to_dict())
        return
    print(
        f"perplexity     {result.perplexity:.4f} ± {result.perplexity_stderr:.4f}  "
        f"({result.tokens} tokens in {result.windows} windows of {result.context})"
    )
    if result.kl_divergence is not None:
        print(f"reference      {result.reference_perplexity:.4f}")
        print(f"KL divergence  {result.kl_divergence:.5f} ± {result.kl_divergence_stderr:.5f}")
