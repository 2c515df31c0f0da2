"""What `run` and `chat` share: loading, sampling options as the runtime takes them, figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqsa_compiler.cli.console import progress

if TYPE_CHECKING:
    from gqsa_compiler.runtime import Generation, Model


def load_one(directory: Path, *, threads: int | None, context: int | None, verify: bool) -> Model:
    """Load an artefact for one sequence: its cache holds one context, not a whole batch."""
    from gqsa_compiler.runtime import load

    # Checking the hashes of a large model reads gigabytes.
    with progress(transient=True) as report_progress:
        report_progress("Loading the model", 0, 0)
        return load(directory, threads=threads, verify=verify, context_length=context, max_batch=1)


def given(**settings: Any) -> dict[str, Any]:
    """Return the settings that the user gave; the model's own stand for the others."""
    return {key: value for key, value in settings.items() if value not in (None, [])}


def figures(result: Generation) -> str:
    """Say in one line how fast an answer came and why it ended."""
    times = result.timings
    text = f"prompt {times.prompt_tokens} tokens, {times.prefill_tokens_per_second:.1f} tokens/s"
    if times.generated_tokens > 1:
        text += (
            f"; generated {times.generated_tokens} tokens, "
            f"{times.decode_tokens_per_second:.1f} tokens/s"
        )
    else:
        text += f"; generated {times.generated_tokens} tokens"
    return f"[{text}; ended by {result.finish_reason}]"


def as_dict(result: Generation) -> dict[str, Any]:
    """Return an answer as plain data for --json."""
    times = result.timings
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "generated_tokens": times.generated_tokens,
        "first_token_seconds": times.first_token_seconds,
        "prefill_tokens_per_second": times.prefill_tokens_per_second,
        "decode_tokens_per_second": times.decode_tokens_per_second,
    }
