"""`gqsa run`: one prompt in, the generated text and nothing else on standard output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import emit_json, note, show_settings
from gqsa_compiler.cli.generation import Shared, as_dict, figures, generates, load_one
from gqsa_compiler.cli.paths import read_text, require_artefact, require_utf8
from gqsa_compiler.errors import UsageError

_MOST_BYTES = 64 << 20  # of a prompt


@command
@generates
def run(
    directory: options.Artefact,
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", help="The prompt.", show_default="standard input"),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Read the prompt from a text file.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--no-chat",
            help="--chat wraps the prompt as a user's message in the model's chat template; "
            "--no-chat continues it as plain text.",
        ),
    ] = False,
    max_tokens: options.MaxTokens = 256,
    rpc: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Run on the device there, which runs TVM's RPC server."
        ),
    ] = None,
    *,
    shared: Shared,
) -> None:
    """Generate text from a prompt, as it comes; figures go to standard error."""
    require_artefact(directory)
    text = _prompt(prompt, file)
    show_settings(
        "run",
        {
            "artefact": directory,
            "chat template": chat,
            "max tokens": max_tokens,
            "device": rpc or "this machine",
            **shared.settings(),
        },
    )
    request: Any = [{"role": "user", "content": text}] if chat else text
    with load_one(directory, shared, rpc) as model:
        start = model.stream_chat if chat else model.stream
        stream = start(request, max_tokens=max_tokens, **shared.sampling())
        for piece in stream:
            if not shared.json:
                print(piece, end="", flush=True)
        result = stream.result
        if shared.json:
            emit_json(as_dict(result))
            return
        if sys.stdout.isatty():
            print()
        if model.chat_template is not None and not chat:
            note("This model has a chat template; --chat applies it.")
        note(figures(result))


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise UsageError("Give the prompt with -p or with -f, not with both.")
    if file is not None:
        return read_text(file, "-f", _MOST_BYTES)
    if prompt is not None and prompt != "-":
        return require_utf8(prompt, "The prompt")
    if prompt is None and sys.stdin.isatty():
        raise UsageError("There is no prompt; give one with -p TEXT, -f FILE or standard input.")
    text = sys.stdin.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise UsageError(
            f"Standard input has more than {_MOST_BYTES >> 20} MiB, which fit no context; give a "
            "shorter prompt."
        )
    return require_utf8(text, "The prompt")
