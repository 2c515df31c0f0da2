"""One request: its options, its state while it runs, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from gqsa_compiler.runtime.errors import UsageError
from gqsa_compiler.runtime.sampling import Sampler, SamplingOptions
from gqsa_compiler.runtime.tokens import StopStrings, TextDecoder

if TYPE_CHECKING:
    from gqsa_compiler.runtime.engine import Session

FinishReason = Literal["eos", "stop", "length"]

DEFAULT_MAX_TOKENS = 256
_CONTEXT_TOKENS = 8  # prompt tokens that the decoder sees before the first new one


class Options(TypedDict, total=False):
    """What every generating method takes; what is absent comes from `generation_config.json`.

    ``max_tokens`` (256 unless given), ``temperature``, ``top_k``, ``top_p``, ``min_p``,
    ``repetition_penalty`` and ``seed`` (see `SamplingOptions`), ``stop`` (a string or several: the
    text ends before the first of them), ``ignore_eos`` (go on after an end-of-text token),
    ``adapter`` (one of the artefact's; None is the model alone).
    """

    max_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str]
    ignore_eos: bool
    adapter: str | None


@dataclass(frozen=True)
class Timings:
    """How long a request took: tokens that were computed, and seconds."""

    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def first_token_seconds(self) -> float:
        """Time from the request to its first token."""
        return self.prefill_seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        """Speed of reading the prompt."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of writing, the first token (which the prefill gives) not counted."""
        passes = self.generated_tokens - 1
        return passes / self.decode_seconds if passes > 0 and self.decode_seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    Parameters
    ----------
    text : str
        The new text, without the stop string.
    token_ids : tuple of int
        The new tokens, the end-of-text token not among them.
    finish_reason : str
        ``eos``: the model ended it; ``stop``: a stop string; ``length``: `max_tokens` or the
        context.
    prompt_tokens : int
        Tokens of the prompt.
    timings : Timings
        How long it took.
    cached_tokens : int
        Tokens of the prompt that were in the cache (`Conversation`).

    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    timings: Timings
    cached_tokens: int = 0


def advance(session: Session, requests: Sequence[Request]) -> np.ndarray:
    """Decode the last token of each request; return what each is to `accept`, one after another.

    That is a row of logits, or where a GPU can choose for all of them a token each.
    """
    sequences = [request.sequence for request in requests]
    tokens = [request.token_ids[-1] for request in requests]
    samplers = [request.sampler for request in requests]
    if session.can_choose(sequences) and all(s.draws_on_device for s in samplers):
        return session.decode(sequences, tokens, np.stack([s.draw() for s in samplers]))
    return session.decode(sequences, tokens)


class Request:
    """A sequence on its way: give it each pass's logits until `finish_reason` is set."""

    def __init__(
        self,
        prompt: Sequence[int],
        options: Options,
        defaults: Mapping[str, Any],
        *,
        tokenizer: Any,
        eos: frozenset[int],
        vocab_size: int,
        context_length: int,
        continues: bool,
    ) -> None:
        unknown = set(options) - Options.__annotations__.keys()
        if unknown:
            raise UsageError(f"There is no generation option {sorted(unknown)[0]!r}.")
        room = context_length - len(prompt)
        if room < 1:
            raise UsageError(
                f"The prompt has {len(prompt)} tokens and the context {context_length}, which "
                "leaves no room for an answer; shorten the prompt, or compile the model with a "
                "larger --context."
            )
        most = options.get("max_tokens", DEFAULT_MAX_TOKENS)
        if not isinstance(most, int | np.integer) or most < 1:
            raise UsageError(f"max_tokens is {most} and must be a whole number, at least 1.")
        stops = _stop_strings(options.get("stop", ()))
        self.prompt = list(prompt)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.sequence = -1
        self.adapter = options.get("adapter")
        self.cached_tokens = 0
        self._room = min(most, room)
        self._eos = frozenset[int]() if options.get("ignore_eos") else eos
        self.sampler = Sampler(sampling_options(options, defaults), vocab_size, self.prompt)
        context = self.prompt[-_CONTEXT_TOKENS:] if continues else []
        self._decoder, self._stops = TextDecoder(tokenizer, context), StopStrings(stops)
        self._text: list[str] = []
        self._started = self._first = self._ended = 0.0

    @property
    def all_tokens(self) -> list[int]:
        """The prompt's and the answer's so far; the last one may not be in the cache yet."""
        return self.prompt + self.token_ids

    def start(self) -> None:
        """Note that its prefill begins now."""
        self._started = time.perf_counter()

    def accept(self, logits: np.ndarray) -> str:
        """Choose the next token from float32 logits [V]; return the text that it releases.

        Or take the token, a number, that was chosen on a GPU.
        """
        token = self.sampler(logits) if logits.ndim else self.sampler.take(int(logits))
        self._ended = time.perf_counter()
        self._first = self._first or self._ended
        if token in self._eos:
            self.finish_reason, text = "eos", ""
        else:
            self.token_ids.append(token)
            text = self._stops.push(self._decoder.push(token))
            if len(self.token_ids) == self._room:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._stops.push(self._decoder.flush()) + self._stops.flush()
        if self._stops.stopped:
            self.finish_reason = "stop"
        self._text.append(text)
        return text

    def result(self) -> Generation:
        """Return the finished answer."""
        assert self.finish_reason is not None
        timings = Timings(
            len(self.prompt) - self.cached_tokens,
            len(self.token_ids),
            self._first - self._started,
            self._ended - self._first,
        )
        return Generation(
            "".join(self._text),
            tuple(self.token_ids),
            self.finish_reason,
            len(self.prompt),
            timings,
            self.cached_tokens,
        )


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(one, str) for one in stops):
        raise UsageError(f"stop is {stop!r} and must be a text or a list of texts.")
    if "" in stops:
        raise UsageError("A stop string is empty; leave it out or give it some text.")
    return tuple(stops)


def sampling_options(options: Options, defaults: Mapping[str, Any]) -> SamplingOptions:
    """Fill what a caller left open from a model's `generation_config.json`.

    As in Hugging Face's `generate`, a model that does not say ``do_sample`` is greedy.
    """
    chosen: dict[str, Any] = {}
    for field in fields(SamplingOptions):
        value = options.get(field.name)
        if value is None and field.name != "seed":
            value = defaults.get(field.name)
            if field.name == "temperature" and not defaults.get("do_sample"):
                value = 0.0
            elif field.name == "temperature" and value is None:
                value = 1.0
        if value is not None:
            chosen[field.name] = value
    try:
        return SamplingOptions(**chosen)
    except TypeError as error:
        raise UsageError(f"A sampling option has a value of the wrong type: {error}.") from None
