"""A conversation whose tokens stay in the cache from one answer to the next."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gqsa_compiler.runtime.engine import Session
from gqsa_compiler.runtime.errors import UsageError
from gqsa_compiler.runtime.generation import Options, Request, advance
from gqsa_compiler.runtime.stream import TextStream, in_slices

if TYPE_CHECKING:
    from typing_extensions import Unpack

Messages = Sequence[Mapping[str, Any]]


class Conversation:
    """Answers to one conversation, each of which computes only what is new in its prompt.

    `Model.conversation` makes it. It keeps one of the model's `max_batch` sequences until it is
    closed; use it as a context manager, or `close` it.

    Parameters
    ----------
    session : Session
        Where its sequence is.
    request : callable
        Makes a request of the messages and the options.
    """

    def __init__(self, session: Session, request: Callable[[Messages, Options], Request]) -> None:
        self._session = session
        self._request = request
        self._sequence: int | None = None
        self._last: Request | None = None

    def stream(self, messages: Messages, **options: Unpack[Options]) -> TextStream:
        """Answer a conversation, giving the text in pieces as it comes.

        The prompt is the one that `Model.stream_chat` makes of the same messages. As far as its
        tokens are those of the last answer and its prompt they are not computed again, be it all of
        them or, where a template writes an earlier message in another way or another adapter is
        asked for, none.

        Parameters
        ----------
        messages : sequence of mappings
            All of them, also those that were there for the last answer.
        **options
            As for `Model.generate`.

        Raises
        ------
        UsageError
            As `Model.chat`; or, from the stream, the session has no place for a sequence, or a
            later answer has begun.

        """
        request = self._request(messages, options)
        return TextStream(request, in_slices(self._session, self._steps(request)))

    def close(self) -> None:
        """Give the sequence back; a later answer takes a new one."""
        if self._sequence is not None:
            self._session.remove(self._sequence)
            self._sequence = self._last = None

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _steps(self, request: Request) -> Generator[tuple[Request, str], None, None]:
        """Compute the answer; always on the session's thread."""
        request.start()
        request.sequence = sequence = self._resume(request)
        try:
            new = request.prompt[request.cached_tokens :]
            for logits in self._session.prefill_chunks(sequence, new):
                yield request, "" if logits is None else request.accept(logits)
                self._check(request)
            while request.finish_reason is None:
                (logits,) = advance(self._session, [request])
                yield request, request.accept(logits)
                self._check(request)
        except Exception:
            # What a pass that failed has left in the cache is not known.
            if self._last is request:
                self.close()
            raise

    def _resume(self, request: Request) -> int:
        """Cut the cached tokens back to those that the prompt begins with."""
        last, self._last = self._last, request
        if self._sequence is not None and last is not None and last.adapter != request.adapter:
            # What is in the cache is another adapter's.
            self._session.remove(self._sequence)
            self._sequence = None
        if self._sequence is None or last is None:
            self._sequence = self._session.add(request.adapter)
            return self._sequence
        cached = last.all_tokens[: self._session.length(self._sequence)]
        # The last token of the prompt is computed in any case: its logits are wanted.
        limit = min(len(cached), len(request.prompt) - 1)
        differ = (i for i in range(limit) if cached[i] != request.prompt[i])
        request.cached_tokens = next(differ, limit)
        self._session.rewind(self._sequence, request.cached_tokens)
        return self._sequence

    def _check(self, request: Request) -> None:
        """Let an answer end that another one has overtaken: the sequence is not its own."""
        if self._last is not request:
            raise UsageError(
                "Another answer of this conversation has begun, or it was closed; read an answer "
                "to its end before the next one."
            )
