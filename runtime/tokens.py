"""Text to tokens and back, a token at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from gqsa_compiler.runtime.errors import ArtefactError

TOKENIZER_FILE = "tokenizer.json"
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """Read `tokenizer.json`.

    Raises
    ------
    ArtefactError
        It is missing or damaged.

    """
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise ArtefactError(f"The artefact is incomplete: there is no {path}.")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ArtefactError(f"{path} cannot be read: {error}.") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class TextDecoder:
    """Turns tokens into text as they come, never emitting part of a character.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        The model's.
    context : sequence of int
        Tokens before the first one, whose text is not emitted. SentencePiece tokenizers drop the
        space before a text's first word; with context, a continuation keeps it.

    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._ids = list(context)
        self._start, self._emitted = 0, len(self._ids)

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now, maybe none."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_BROKEN):
            return ""
        # The emitted tokens stay as context for the next ones, those before them can go.
        self._start, self._emitted = self._emitted, len(self._ids)
        return text

    def flush(self) -> str:
        """Return what is held back, broken characters included; for the end of a text."""
        text = self._new_text()
        self._start = self._emitted = len(self._ids)
        return text

    def _new_text(self) -> str:
        before: str = self._decode(self._ids[self._start : self._emitted])
        text: str = self._decode(self._ids[self._start :])
        return text[len(before) :]


class StopStrings:
    """Cuts a stream of text at the first stop string, holding back what may become one.

    Parameters
    ----------
    stops : iterable of str
        Not empty strings. Of several, the one that is complete first wins.

    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; return what may be emitted. After a stop string, `stopped` is set."""
        if self.stopped:
            return ""
        held = self._held + text
        ends = [(at + len(s), -len(s)) for s in self._stops if (at := held.find(s)) >= 0]
        if ends:
            end, negative = min(ends)
            self.stopped, self._held = True, ""
            return held[: end + negative]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """Return what is held back: the text ended and it became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
