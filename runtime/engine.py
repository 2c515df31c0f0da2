"""A session: the compiled functions, their parameters and one paged key/value cache.

Every call into TVM is made on a thread of `workers`, so a session has exactly the threads it asked
for and pins nobody else's; and several threads of a program may use one session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from gqsa_compiler.runtime import cpus, library, params
from gqsa_compiler.runtime._ffi import tvm_ffi
from gqsa_compiler.runtime.devices import Device, MemorySum, fit_cache, out_of_memory
from gqsa_compiler.runtime.errors import ArtefactError, UsageError
from gqsa_compiler.runtime.manifest import SCORE_ROWS, Manifest
from gqsa_compiler.runtime.workers import Workers

T = TypeVar("T")


class Instrument(Protocol):
    """What `Session.set_instrument` takes: called before and after each call of the compiled code.

    `name` is the called function's in the library, or a builtin's of TVM; `result` is None
    before the call. Calls can be nested.
    """

    def __call__(
        self, function: Any, name: str, before: bool, result: Any, *arguments: Any
    ) -> None:
        """Take note of a call."""


class Program:
    """The compiled code and the mapped parameters of one artefact: shared by its sessions.

    Parameters
    ----------
    directory : Path
        The artefact.
    manifest : Manifest
        Its manifest.
    verify : bool
        Check the parameters' SHA-256.
    variant : str, optional
        Target name of the variant to run; the best that this machine can run unless given.

    Raises
    ------
    ArtefactError
        Whatever `library.choose`, `library.check` and `params.map_params` refuse.
    UsageError
        There is no such variant.

    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        verify: bool = True,
        variant: str | None = None,
    ) -> None:
        self.variant = library.choose(manifest, variant)
        libraries = library.check(directory, manifest, self.variant)
        views = params.map_params(
            directory / manifest.parameters_file, manifest.parameters, verify=verify
        )
        self.manifest = manifest
        self.module = library.load_executable(
            libraries, directory / self.variant.library.file, manifest.versions.tvm
        )
        # A typed view made by TVM itself: numpy has no bfloat16 to say it in.
        create_view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
        self.device = Device(self.variant.target.device_type)
        self.parameters = tvm_ffi.Array(
            [
                self.device.upload(
                    create_view(_tensor(view), tvm_ffi.Shape(p.shape), tvm_ffi.dtype(p.dtype), 0)
                )
                for view, p in zip(views, manifest.parameters, strict=True)
            ]
        )

    def session(
        self,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        max_batch: int | None = None,
    ) -> Session:
        """Open a session; see `Session`."""
        return Session(self, threads=threads, context_length=context_length, max_batch=max_batch)


class Session:
    """Sequences in a paged key/value cache, and the passes over them.

    Parameters
    ----------
    program : Program
        The code and weights.
    threads : int, optional
        Worker threads; one for every core this process may use unless given.
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
        self.memory = self._fit(
            program.manifest, fewer=max_batch is None, shorter=context_length is None
        )
        self.vocab_size = model.vocab_size
        allowed = cpus.allowed_cpus()
        if threads is not None and not 1 <= threads <= len(allowed):
            raise UsageError(
                f"threads is {threads} and this process may use {len(allowed)} CPUs; "
                f"choose 1 to {len(allowed)}."
            )
        self.threads = threads or cpus.default_threads()
        self._chunk = model.prefill_chunk
        self._page = program.manifest.kv_cache.page_size
        self._manifest = program.manifest
        self._parameters = program.parameters
        self._lengths: dict[int, int] = {}
        self._next = 0
        self._closed = False
        self._left = deque[Callable[[], object]]()
        self._workers = Workers.share(allowed[: self.threads])
        try:
            self._on_thread(self._start, program.module, program.manifest.kv_cache.bytes_per_token)
        except BaseException:
            self._workers.release()
            raise

    def _start(self, module: Any, token_bytes: int) -> None:
        try:
            vm = module["vm_load_executable"]()
            vm["vm_initialization"](*self._device.vm_arguments)
            self._forward, self._hidden = vm["forward"], vm["hidden_states"]
            self._logits, create = vm["logits"], vm["create_kv_cache"]
        except AttributeError as error:
            raise ArtefactError(
                f"The artefact's library is not a compiled model: {error}."
            ) from None
        self._vm = vm
        pages = -(-self.context_length // self._page) * self.max_batch
        tokens = pages * self._page
        try:
            self._kv = create(tvm_ffi.Shape((self.max_batch, tokens, self._chunk)))
        except (RuntimeError, ValueError, MemoryError) as error:
            raise UsageError(
                f"The key/value cache of {tokens} tokens ({tokens * token_bytes / 1e9:.1f} GB) "
                f"cannot be made: {error}. Ask for a smaller context or batch."
            ) from None
        state = {
            name: tvm_ffi.get_global_func(f"vm.builtin.kv_state_{name}")
            for name in ("add_sequence", "remove_sequence", "begin_forward", "end_forward")
        }
        self._add, self._remove = state["add_sequence"], state["remove_sequence"]
        self._begin, self._end = state["begin_forward"], state["end_forward"]

    def _fit(self, manifest: Manifest, *, fewer: bool, shorter: bool) -> MemorySum | None:
        """Fit the limits into a GPU's memory; a CPU's pages are taken as they are used."""
        free = self._device.free_bytes()
        if free is None:
            return None
        found = fit_cache(
            manifest, free, self.max_batch, self.context_length, fewer=fewer, shorter=shorter
        )
        self.max_batch, self.context_length = found.sequences, found.context
        return found

    def add(self) -> int:
        """Open an empty sequence and return its number.

        Raises
        ------
        UsageError
            There are `max_batch` sequences already.

        """
        if self._left:
            self._on_thread(_nothing)
        if len(self._lengths) >= self.max_batch:
            raise UsageError(
                f"The session holds {self.max_batch} sequences, all that max_batch allows; "
                "finish one first or load the artefact with a larger max_batch."
            )
        sequence, self._next = self._next, self._next + 1
        self._lengths[sequence] = 0
        self._on_thread(self._add, self._kv, sequence)
        return sequence

    def remove(self, sequence: int) -> None:
        """Forget a sequence and free its pages; one that is gone already is no error."""
        if self._lengths.pop(sequence, None) is not None:
            self._on_thread(self._remove, self._kv, sequence)

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
                yield self._pass([sequence], chunk, self._forward, rows)[0]
            else:
                self._pass([sequence], chunk, self._hidden)
                yield None

    def decode(self, sequences: Sequence[int], tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Append one token to each of several sequences.

        Parameters
        ----------
        sequences : sequence of int [b]
            Different ones, at most `max_batch`.
        tokens : sequence of int [b]
            The token of each.

        Returns
        -------
        ndarray
            float32 [b, V], memory of TVM's, not copied.

        Raises
        ------
        UsageError
            A sequence is unknown, named twice or full, a token is no number of the vocabulary, or
            there are more or fewer tokens than sequences.

        """
        ids = self.check_tokens(tokens)
        if len(ids) != len(sequences):
            raise UsageError(
                f"There are {len(ids)} tokens for {len(sequences)} sequences; give one for each."
            )
        if len(set(sequences)) != len(sequences):
            raise UsageError("A sequence is named twice; decode takes one token for each.")
        for sequence in sequences:
            self._require_room(self.length(sequence) + 1)
        rows = np.arange(len(sequences), dtype=np.int32)
        return self._pass(sequences, ids, self._forward, rows)

    def score(self, tokens: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """Yield the logits that follow each token of a text, in order.

        Parameters
        ----------
        tokens : sequence of int [n]
            One text, at most `context_length` tokens.

        Yields
        ------
        ndarray
            float32 [r, V], r at most `SCORE_ROWS`; together [n, V]. Row i says what follows
            token i.

        """
        sequence = self.add()
        try:
            for chunk, _ in self._chunks(sequence, tokens):
                hidden = self._pass([sequence], chunk, self._hidden)
                for start in range(0, len(hidden), SCORE_ROWS):
                    yield self._on_thread(self._score, hidden[start : start + SCORE_ROWS])
        finally:
            self.remove(sequence)

    def _score(self, hidden: np.ndarray) -> np.ndarray:
        rows = self._device.upload(_tensor(hidden))
        return self._device.download(self._logits(rows, self._parameters))

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
        """Return token ids as int32 [n]: the compiled embedding would read whatever lies there.

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
        self._on_thread(lambda: self._vm["set_instrument"](tvm_ffi.convert(instrument)))

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
            self._on_thread(self._free)
            self._closed = True
            self._workers.release()

    def _free(self) -> None:
        self._lengths.clear()
        self._kv = self._vm = self._forward = self._hidden = self._logits = None

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
        function: Callable[..., Any],
        *rows: np.ndarray,
    ) -> np.ndarray:
        """Run one forward pass, the cache's begin and end included, whole on the thread."""
        each = len(tokens) // len(sequences)
        result: np.ndarray = self._on_thread(
            self._run, tuple(sequences), each, tokens, function, rows
        )
        for sequence in sequences:
            self._lengths[sequence] += each
        return result

    def _run(
        self,
        sequences: tuple[int, ...],
        each: int,
        tokens: np.ndarray,
        function: Callable[..., Any],
        rows: tuple[np.ndarray, ...],
    ) -> np.ndarray:
        lengths = tvm_ffi.Shape((each,) * len(sequences))
        self._begin(self._kv, tvm_ffi.Shape(sequences), lengths)
        try:
            upload = self._device.upload
            arguments = [upload(_tensor(_aligned(array))) for array in (tokens, *rows)]
            return self._device.download(function(*arguments, self._kv, self._parameters))
        except Exception as error:
            if self._device.is_cpu or not out_of_memory(error):
                raise
            raise UsageError(
                f"GPU {self._device.index} is out of memory in the middle of a pass; ask for a "
                "smaller context or batch, or end what else runs on it."
            ) from None
        finally:
            self._end(self._kv)

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
    if not 1 <= asked <= most:
        raise UsageError(
            f"{name} is {asked} and the artefact was compiled for 1 to {most}; "
            "choose one of those or compile the model again."
        )
    return asked


def _tensor(array: np.ndarray) -> Any:
    return tvm_ffi.from_dlpack(array)


def _aligned(ids: np.ndarray) -> np.ndarray:
    """Copy int32 [n] to where TVM's code takes arguments to be; numpy only promises 16 bytes."""
    buffer = np.empty(len(ids) + params.ALIGNMENT // 4, np.int32)
    start = -buffer.ctypes.data % params.ALIGNMENT // 4
    buffer[start : start + len(ids)] = ids
    return buffer[start : start + len(ids)]
