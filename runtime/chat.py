"""The model's own chat template (Jinja), rendered as transformers renders it."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gqsa_compiler.runtime.errors import ArtefactError, UsageError

TEMPLATE_FILE = "chat_template.jinja"


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2's own protocol

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template.

    Parameters
    ----------
    source : str
        Jinja. It comes with the model and is not trusted: it runs in jinja2's sandbox.
    tokens : mapping of str to str
        ``bos_token``, ``eos_token`` and so on, which templates refer to.

    Raises
    ------
    ArtefactError
        The template is not valid Jinja.

    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # not only jinja2's: Python compiles what it writes
            raise ArtefactError(f"The model's chat template is not valid: {error}.") from None
        self._tokens = dict(tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Write a conversation as the model was trained to read it.

        Parameters
        ----------
        messages : sequence of mappings
            Each with ``role`` and ``content``, as the template expects.
        add_generation_prompt : bool
            End with the assistant's opening.
        **variables
            More for the template, such as ``tools`` or ``enable_thinking``.

        Raises
        ------
        UsageError
            There are no messages, or the template refuses them; its own words are in the message.
        ArtefactError
            The template itself is wrong; it divides by zero, for instance.

        """
        if not messages:
            raise UsageError("The conversation has no messages; at least one is needed.")
        context = {"tools": None, "documents": None, **self._tokens, **variables}
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **context
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise UsageError(f"The model's chat template refuses the messages: {error}.") from None
        except Exception as error:  # a template can do whatever an expression can
            raise ArtefactError(
                f"The model's chat template fails: {type(error).__name__}: {error}."
            ) from None

    def render_parts(
        self, messages: Sequence[Mapping[str, Any]], special: Collection[str], **options: Any
    ) -> list[tuple[str, bool]]:
        """Render a conversation and tell the template's special tokens from the messages' text.

        Parameters
        ----------
        messages, **options
            As in `render`.
        special : collection of str
            The texts that the tokenizer reads as special tokens.

        Returns
        -------
        list of (str, bool)
            Together the text that `render` gives. True marks what stands in a message and is
            spelled like a special token, but is none: the words of whoever wrote the message.

        Raises
        ------
        UsageError
            As in `render`.

        """
        spellings = sorted(filter(None, special), key=len, reverse=True)
        if not spellings:
            return [(self.render(messages, **options), False)]
        # Digits only, whatever a template does to text; too many of them for a message to guess.
        mark = f"{secrets.randbelow(10**30):030}"
        pattern = re.compile("|".join(map(re.escape, spellings)))

        def hide(text: str) -> str:
            return pattern.sub(lambda found: f"{mark}{spellings.index(found[0]):06}", text)

        text = self.render([_map_text(message, hide) for message in messages], **options)
        pieces = re.split(f"{mark}([0-9]{{6}})", text)
        parts = [(spellings[int(p)], True) if i % 2 else (p, False) for i, p in enumerate(pieces)]
        return [part for part in parts if part[0]]


def load_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """Build the template of `chat_template.jinja`, where the compiler puts it, if there is one."""
    path = directory / TEMPLATE_FILE
    try:
        source = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}.") from None
    return ChatTemplate(source, special_tokens(tokenizer_config))


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Collect ``bos_token`` and its like: plain strings, or objects with a ``content``."""
    tokens = {}
    for key, value in tokenizer_config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Copy plain data with every string in it changed, keys excepted."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_text(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_text(item, change) for item in value]
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which no model has seen in training.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
