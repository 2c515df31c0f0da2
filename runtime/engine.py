"""A session: sequences of tokens, and the passes of the compiled functions over them.

Every call into TVM is made on a thread of `workers`, so a session has exactly the threads it asked
for and pins nobody else's; and several threads of a program may use one session.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from gqsa_compiler.runtime import cpus
from gqsa_compiler.runtime.adapters import PREFIX, Adapters, together
from gqsa_compiler.runtime.devices import MemorySum, fit_cache
from gqsa_compiler.runtime.errors import UsageError
from gqsa_compiler.runtime.machine import Code, Instrument, Limits
from gqsa_compiler.runtime.manifest import SCORE_ROWS, Manifest
from gqsa_compiler.runtime.program import Program
from gqsa_compiler.runtime.workers import Workers

T = TypeVar("T")


class Session:
    """Sequences in a paged key/value cache, and the passes over them.

    Parameters
    ----------
    program : Program
        The code and weights.
    threads : int, optional
        Worker threads; one for every core this process may use unless given. A GPU is
        asked by one thread of a process, however many are given.
    context_length, max_batch : int, optional
        Tokens a sequence may have, and sequences at once; the artefact's own unless given. The
        cache reserves ``context_length * max_batch`` tokens of address space; memory is used as
        sequences grow. On a GPU memory is taken at once; what is left open becomes smaller if
        not all fits what is free (`memory` has the sum).

    Raises
    ------
    UsageError
        A limit is beyond what the artefact was compiled for, or there is not enough memory.

    """

    def __init__(
        self,
        program: Program,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        max_batch: int | None = None,
    ) -> None:
        model = program.manifest.model
        self.context_length = _limit("context_length", context_length, model.context_length)
        self.max_batch = _limit("max_batch", max_batch, model.max_batch)
        self._device = program.device
        self.vocab_size = model.vocab_size
        allowed = cpus.allowed_cpus()
        if threads is not None and not 1 <= threads <= len(allowed):
            raise UsageError(
                f"threads is {threads} and this process may use {len(allowed)} CPUs; "
                f"choose 1 to {len(allowed)}."
            )
        self.threads = threads or cpus.default_threads()
        self._chunk = model.prefill_chunk
        self._manifest = program.manifest
        self._program = program  # a GPU frees its weights after its sessions
        self._parameters = program.parameters
        self.adapters = Adapters(program.manifest, program.parameters)
        self._chosen: dict[int, str] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0
        self._opening = threading.Lock()
        self._closed = False
        self._left = deque[Callable[[], object]]()
        on_gpu = not self._device.is_cpu
        self._workers = Workers.share(allowed[: self.threads], gpu=on_gpu)
        try:
            self.memory = self._fit(
                program.manifest, fewer=max_batch is None, shorter=context_length is None
            )
            limits = Limits(self.context_length, self.max_batch)
            self._machine = self._on_thread(program.machine, limits)
        except BaseException:
            self._workers.release()
            raise
        if on_gpu:
            self._workers.after(self, self._machine.free)

    def _fit(self, manifest: Manifest, *, fewer: bool, shorter: bool) -> MemorySum | None:
        """Fit the limits into a GPU's memory; a CPU's pages are taken as they are used."""
        free = self._on_thread(self._device.free_bytes)
        if free is None:
            return None
        found = fit_cache(
            manifest, free, self.max_batch, self.context_length, fewer=fewer, shorter=shorter
        )
        self.max_batch, self.context_length = found.sequences, found.context
        return found

    def add(self, adapter: str | None = None) -> int:
        """Open an empty sequence and return its number.

        Parameters
        ----------
        adapter : str, optional
            One of `adapters.names`, for all of the sequence; the model alone unless given.

        Raises
        ------
        UsageError
            There are `max_batch` sequences already, or there is no such adapter.

        """
        self.adapters.check(adapter)
        if self._left:
            self._on_thread(_nothing)
        with self._opening:
            if len(self._lengths) >= self.max_batch:
                raise UsageError(
                    f"The session holds {self.max_batch} sequences, all that max_batch allows; "
                    "finish one first or load the artefact with a larger max_batch."
                )
            sequence, self._next = self._next, self._next + 1
            self._lengths[sequence] = 0
        if adapter is not None:
            self._chosen[sequence] = adapter
        self._on_thread(self._machine.add, sequence)
        return sequence

    def remove(self, sequence: int) -> None:
        """Forget a sequence and free its pages; one that is gone already is no error."""
        if self._lengths.pop(sequence, None) is not None:
            self._chosen.pop(sequence, None)
            self._on_thread(self._machine.remove, sequence)

    def length(self, sequence: int) -> int:
        """Return the number of tokens that a sequence has in the cache.

        Raises
        ------
        UsageError
            There is no such sequence.

        """
        if sequence not in self._lengths:
            raise UsageError(f"The session has no sequence {sequence}; open one with add().")
        return self._lengths[sequence]

    def rewind(self, sequence: int, length: int) -> None:
        """Forget the last tokens of a sequence, so that `length` of them stay.

        Raises
        ------
        UsageError
            There is no such sequence, or it has fewer tokens.

        """
        have = self.length(sequence)
        if not 0 <= length <= have:
            raise UsageError(f"Sequence {sequence} has {have} tokens; {length} cannot stay.")
        self._on_thread(self._machine.pop, sequence, have - length)
        self._lengths[sequence] = length

    def prefill(self, sequence: int, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Append tokens to a sequence, in chunks, and return the last one's logits.

        Parameters
        ----------
        sequence : int
            From `add`.
        tokens : sequence of int [n]
            At least one.

        Returns
        -------
        ndarray
            float32 [V], memory of TVM's, not copied.

        """
        *_, logits = self.prefill_chunks(sequence, tokens)
        assert logits is not None
        return logits

    def prefill_chunks(
        self, sequence: int, tokens: Sequence[int] | np.ndarray
    ) -> Iterator[np.ndarray | None]:
        """Do the same a chunk at a time; yield None after each but the last, which has logits."""
        for chunk, last in self._chunks(sequence, tokens):
            if last:
                rows = np.array([len(chunk) - 1], np.int32)
                code = self._code("forward", sequence)
                yield self._pass([sequence], chunk, partial(self._machine.compute, code, rows))[0]
            else:
                code = self._code("hidden_states", sequence)
                self._pass([sequence], chunk, partial(self._machine.compute, code, None))
                yield None

    def decode(
        self,
        sequences: Sequence[int],
        tokens: Sequence[int] | np.ndarray,
        draws: np.ndarray | None = None,
    ) -> np.ndarray:
        """Append one token to each of several sequences.

        Parameters
        ----------
        sequences : sequence of int [b]
            Different ones, at most `max_batch`.
        tokens : sequence of int [b]
            The token of each.
        draws : ndarray, optional
            float32 [b, 5], from `Sampler.draw`, for the next tokens to be chosen on the GPU; only
            where `can_choose`.

        Returns
        -------
        ndarray
            float32 [b, V], memory of TVM's, not copied. With `draws` the next tokens, int32 [b]:
            -1 where the logits are no finite numbers.

        Raises
        ------
        UsageError
            A sequence is unknown, named twice or full, a token is no number of the vocabulary,
            there are more or fewer tokens than sequences, or `draws` where nothing can choose.

        """
        ids = self.check_tokens(tokens)
        if len(ids) != len(sequences):
            raise UsageError(
                f"There are {len(ids)} tokens for {len(sequences)} sequences; give one for each."
            )
        if len(set(sequences)) != len(sequences):
            raise UsageError("A sequence is named twice; decode takes one token for each.")
        if draws is not None and not self.can_choose(sequences):
            raise UsageError("Only a GPU chooses tokens, without adapters; leave draws out.")
        for sequence in sequences:
            self._require_room(self.length(sequence) + 1)
        if self._chosen:
            groups = together([self._chosen.get(sequence) for sequence in sequences])
            if len(groups) > 1:
                return self._on_thread(self._decode_groups, groups, sequences, ids)
        if self._machine.graphs is None or sequences[0] in self._chosen:
            rows = np.arange(len(sequences), dtype=np.int32)
            code = self._code("forward", sequences[0])
            return self._pass(sequences, ids, partial(self._machine.compute, code, rows))
        lengths = [self._lengths[sequence] + 1 for sequence in sequences]
        play = partial(self._machine.play, lengths, self._parameters, draws)
        return self._pass(sequences, ids, play)

    def _decode_groups(
        self, groups: list[list[int]], sequences: Sequence[int], ids: np.ndarray
    ) -> np.ndarray:
        """Decode sequences of several adapters, a group each; all of them, or none where one fails.

        `groups` are places in `sequences`.
        """
        logits = np.empty((len(ids), self.vocab_size), np.float32)
        done: list[int] = []
        try:
            for group in groups:
                members = [sequences[i] for i in group]
                logits[group] = self.decode(members, ids[group])
                done += members
        except BaseException:
            for sequence in done:
                self.rewind(sequence, self._lengths[sequence] - 1)
            raise
        return logits

    def can_choose(self, sequences: Sequence[int]) -> bool:
        """Tell whether `decode` can choose the next tokens: a GPU's can, without adapters."""
        return self._machine.graphs is not None and not any(s in self._chosen for s in sequences)

    def score(
        self, tokens: Sequence[int] | np.ndarray, adapter: str | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the logits that follow each token of a text, in order.

        Parameters
        ----------
        tokens : sequence of int [n]
            One text, at most `context_length` tokens.
        adapter : str, optional
            As for `add`.

        Yields
        ------
        ndarray
            float32 [r, V], r at most `SCORE_ROWS`; together [n, V]. Row i says what follows
            token i.

        """
        sequence = self.add(adapter)
        try:
            code = self._code("hidden_states", sequence)
            for chunk, _ in self._chunks(sequence, tokens):
                hidden = self._pass([sequence], chunk, partial(self._machine.compute, code, None))
                for start in range(0, len(hidden), SCORE_ROWS):
                    rows = hidden[start : start + SCORE_ROWS]
                    logits = self._code("logits", sequence)
                    yield self._on_thread(self._machine.score, logits, rows)
        finally:
            self.remove(sequence)

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function on the session's thread, where its passes run.

        Another thread's call of `decode` has to be handed over and its result handed back, which
        takes a small model 5% of a token. Many calls made by one such function are handed over
        once. Sessions with as many threads share one, so a function should not take it for long.

        Raises
        ------
        UsageError
            The session is closed.

        """
        return self._on_thread(function, *args)

    def later(self, function: Callable[[], object]) -> None:
        """Have a function called on the session's thread before its next call, if there is one.

        For what ends when nobody wants it any more: unlike `run` it takes no lock and waits for
        nothing, so a finaliser may use it anywhere.
        """
        self._left.append(function)

    def check_tokens(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return token ids as int32 [n], all of the vocabulary.

        The compiled embedding would say nothing of another one: it takes the nearest row.

        Raises
        ------
        UsageError
            There are none, or one is no number of the vocabulary.
        """
        ids = np.asarray(tokens)
        if ids.size == 0:
            raise UsageError("The prompt is empty; at least one token is needed.")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(f"Token ids must be a list of integers, not {ids.dtype} {ids.shape}.")
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if wrong.size:
            raise UsageError(
                f"The prompt has the token id {wrong[0]}, and the model's vocabulary is "
                f"0 to {self.vocab_size - 1}."
            )
        return np.ascontiguousarray(ids, dtype=np.int32)

    def set_instrument(self, instrument: Instrument) -> None:
        """Have every call of the compiled functions reported from now on, on the session's thread.

        TVM cannot take an instrument away again: open a session for it.
        """
        self._on_thread(self._machine.set_instrument, instrument)

    @property
    def parameter_addresses(self) -> dict[str, int]:
        """Where each parameter's data lies, by its name: an instrument tells layers by it."""
        names = (parameter.name for parameter in self._manifest.parameters)
        return {n: t.data_ptr() for n, t in zip(names, self._parameters, strict=True)}

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._closed

    def close(self) -> None:
        """Free the cache and its share in the threads; a closed session cannot be used again."""
        if not self._closed:
            self._lengths.clear()
            if not self._workers.left_behind:
                self._on_thread(self._machine.free)
            self._closed = True
            self._workers.release()

    def _on_thread(self, function: Callable[..., T], *args: Any) -> T:
        if self._closed:
            raise UsageError("The session is closed; load the artefact again.")
        if self._workers.here:
            return function(*args)
        return self._workers.call(self._caught_up, function, args)

    def _caught_up(self, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        while self._left:
            self._left.popleft()()
        return function(*args)

    def _pass(
        self,
        sequences: Sequence[int],
        tokens: np.ndarray,
        compute: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Run one forward pass, the cache's begin and end included, whole on the thread."""
        each = len(tokens) // len(sequences)
        result = self._on_thread(self._machine.run, tuple(sequences), each, tokens, compute)
        for sequence in sequences:
            self._lengths[sequence] += each
        return result

    def _code(self, name: str, sequence: int) -> Code:
        """Return a compiled function for a sequence."""
        adapter = self._chosen.get(sequence)
        if adapter is None:
            return Code(name, self._parameters)
        return Code(PREFIX + name, self.adapters.parameters(adapter))

    def _chunks(
        self, sequence: int, tokens: Sequence[int] | np.ndarray
    ) -> Iterator[tuple[np.ndarray, bool]]:
        ids = self.check_tokens(tokens)
        self._require_room(self.length(sequence) + len(ids))
        for start in range(0, len(ids), self._chunk):
            yield ids[start : start + self._chunk], start + self._chunk >= len(ids)

    def _require_room(self, tokens: int) -> None:
        if tokens > self.context_length:
            raise UsageError(
                f"The prompt has {tokens} tokens and the context {self.context_length}; shorten "
                "the prompt, or compile the model with a larger --context."
            )


def _nothing() -> None:
    pass


def _limit(name: str, asked: int | None, most: int) -> int:
    if asked is None:
        return most
    if not isinstance(asked, int) or not 1 <= asked <= most:
        raise UsageError(
            f"{name} is {asked} and the artefact was compiled for 1 to {most}; "
            "choose one of those or compile the model again."
        )
    return asked
