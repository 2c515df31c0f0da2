"""`gqsa chat`: a conversation of several turns."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gqsa_compiler.cli import options
from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.console import note, show_settings
from gqsa_compiler.cli.generation import Shared, as_dict, figures, generates, load_one
from gqsa_compiler.cli.paths import require_artefact, require_utf8
from gqsa_compiler.cli.signals import own_ctrl_c
from gqsa_compiler.errors import UsageError

if TYPE_CHECKING:
    from gqsa_compiler.runtime import Conversation, Generation

_HELP = "/exit ends, /reset forgets the conversation, /stats shows the last answer's figures."


@command
@generates
def chat(
    directory: options.Artefact,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: options.MaxTokens = 512,
    *,
    shared: Shared,
) -> None:
    """Talk with a model: a message a line, answers as they come; --json: one object an answer."""
    require_artefact(directory)
    if system is not None:
        require_utf8(system, "The system message")
    show_settings(
        "chat",
        {
            "artefact": directory,
            "system": system,
            "max tokens": max_tokens,
            **shared.settings(),
        },
    )
    with load_one(directory, shared) as model:
        model.render_chat([{"role": "user", "content": "Hello"}])  # no template: say so at once
        note(_HELP)
        settings = {"max_tokens": max_tokens, **shared.sampling()}
        with own_ctrl_c(), model.conversation() as conversation:
            _Talk(conversation, system, settings, shared.json).run(_lines())


def _lines() -> Iterator[str]:
    """Yield the user's messages until the input ends."""
    if sys.stdin.isatty():
        # Importing it gives `input` line editing and a history.
        import readline  # noqa: F401
    while True:
        try:
            yield require_utf8(input("> " if sys.stdin.isatty() else ""), "The message")
        except EOFError:
            return


class _Talk:
    """The messages so far, and the commands that act on them."""

    def __init__(
        self, conversation: Conversation, system: str | None, settings: dict[str, Any], json: bool
    ) -> None:
        self._conversation = conversation
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)
        self._settings = settings
        self._json = json
        self._last: Generation | None = None

    def run(self, lines: Iterator[str]) -> None:
        """Answer every line; commands begin with a slash."""
        for line in lines:
            message = line.strip()
            if message in ("/exit", "/quit"):
                return
            if message == "/reset":
                self._messages = list(self._opening)
                note("The conversation is forgotten.")
            elif message == "/stats":
                note(figures(self._last) if self._last else "There is no answer yet.")
            elif message.startswith("/"):
                note(f"There is no command {message.split()[0]}. {_HELP}")
            elif message:
                self._answer(message)

    def _answer(self, message: str) -> None:
        self._messages.append({"role": "user", "content": message})
        pieces: list[str] = []
        try:
            stream = self._conversation.stream(self._messages, **self._settings)
            for piece in stream:
                pieces.append(piece)
                if not self._json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            # Ctrl-C ends the answer, not the conversation; a second one at the prompt ends both.
            print(flush=True)
            self._messages.append({"role": "assistant", "content": "".join(pieces)})
            return
        except UsageError as error:
            self._messages.pop()
            note(f"{error} (/reset forgets the conversation.)")
            return
        self._last = stream.result
        self._messages.append({"role": "assistant", "content": self._last.text})
        if self._json:
            answer = {**as_dict(self._last), "cached_tokens": self._last.cached_tokens}
            print(json_module.dumps(answer, ensure_ascii=False), flush=True)
        else:
            print(flush=True)
