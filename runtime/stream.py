"""Text as it comes: steps of generation on the session's thread, a while at a time."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import TypeVar

from gqsa_compiler.runtime.engine import Session
from gqsa_compiler.runtime.errors import UsageError
from gqsa_compiler.runtime.generation import Generation, Request

T = TypeVar("T")

_SLICE = 0.02
"""Seconds that a stream has the session's thread for: a reader does not see such delays."""


class TextStream(Iterator[str]):
    """Pieces of text as they come; the whole `result` when they have all come."""

    def __init__(self, request: Request, pieces: Iterator[tuple[Request, str]]) -> None:
        self._request = request
        self._pieces = (text for _, text in pieces if text)
        self._ended = False

    def __next__(self) -> str:
        for piece in self._pieces:
            return piece
        self._ended = True
        raise StopIteration

    @property
    def result(self) -> Generation:
        """The finished answer.

        Raises
        ------
        UsageError
            The stream has not been read to its end.

        """
        if not self._ended:
            raise UsageError("The stream has not ended; read all its pieces before its result.")
        return self._request.result()


def in_slices(session: Session, steps: Generator[T, None, None]) -> Iterator[T]:
    """Run steps on the session's thread, for a while at a time, and yield what they give.

    A step is a token of all sequences, or a chunk of a prompt.
    """
    try:
        while True:
            pieces, failure = session.run(_for_a_while, steps)
            yield from pieces
            if failure is not None:
                raise failure
            if not pieces:
                return
    finally:
        # Not now: a finaliser may have come here, and a step may be under way after Ctrl-C.
        session.later(steps.close)


def _for_a_while(steps: Iterator[T]) -> tuple[list[T], Exception | None]:
    """Take steps until `_SLICE` is over; one at least, none if there are no more."""
    pieces: list[T] = []
    end = time.monotonic() + _SLICE
    try:
        for piece in steps:
            pieces.append(piece)
            if time.monotonic() >= end:
                break
    except Exception as error:  # after what came before it
        return pieces, error
    return pieces, None
