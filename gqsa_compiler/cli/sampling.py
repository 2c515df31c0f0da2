"""What `run` and `chat` share: sampling options as the runtime takes them, and the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gqsa_compiler.runtime import Generation


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
