"""The public face of an artefact: text in, text out."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from gqsa_compiler.runtime.adapters import Adapters
from gqsa_compiler.runtime.chat import ChatTemplate, load_template, special_tokens
from gqsa_compiler.runtime.conversation import Conversation
from gqsa_compiler.runtime.devices import Device, MemorySum
from gqsa_compiler.runtime.engine import Session
from gqsa_compiler.runtime.errors import ArtefactError, UsageError
from gqsa_compiler.runtime.generation import Generation, Options, Request, advance
from gqsa_compiler.runtime.generation_config import GENERATION_CONFIG, check_generation_config
from gqsa_compiler.runtime.json_file import read_json
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.program import Program
from gqsa_compiler.runtime.stream import TextStream, in_slices
from gqsa_compiler.runtime.tokens import load_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


def load(
    directory: str | Path,
    *,
    threads: int | None = None,
    verify: bool = True,
    context_length: int | None = None,
    max_batch: int | None = None,
    variant: str | None = None,
    adapter: str | None = None,
) -> Model:
    """Load a compiled artefact.

    Parameters
    ----------
    directory : str or Path
        What `gqsa-compile` wrote.
    threads : int, optional
        Worker threads; one for every core this process may use unless given.
    verify : bool
        Compare every parameter's SHA-256 with the manifest's: one read of the whole file.
    context_length, max_batch : int, optional
        Smaller limits than the artefact was compiled with, to save memory.
    variant : str, optional
        Target name of the code to run, where the artefact has code for several; the best that
        this machine can run unless given.
    adapter : str, optional
        The adapter of every request that names none; the model alone unless given.

    Raises
    ------
    ArtefactError
        The artefact is damaged, of another format version, or for another machine.
    UsageError
        A limit is out of range, or there is no such variant or adapter.

    """
    path = Path(directory)
    return Model(
        path,
        Program(path, Manifest.read(path), verify=verify, variant=variant),
        threads=threads,
        context_length=context_length,
        max_batch=max_batch,
        adapter=adapter,
    )


class Model:
    """A loaded artefact; made by `load`. Use it as a context manager, or `close` it.

    Its methods share one cache: call them from one thread at a time, and open a `session` for
    more.
    """

    def __init__(
        self,
        directory: Path,
        program: Program,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        max_batch: int | None = None,
        adapter: str | None = None,
    ) -> None:
        Adapters(program.manifest, program.parameters).check(adapter)
        self.adapter = adapter
        self.manifest = program.manifest
        self.tokenizer = load_tokenizer(directory)
        tokenizer_config = _read_json(directory / "tokenizer_config.json")
        self.generation_config = _read_json(directory / GENERATION_CONFIG)
        check_generation_config(self.generation_config, directory / GENERATION_CONFIG)
        self.chat_template = load_template(directory, tokenizer_config)
        self.eos_token_ids = self._eos(tokenizer_config)
        added = self.tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._program = program
        self._session = self.session(
            threads=threads, context_length=context_length, max_batch=max_batch
        )

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Generation:
        """Continue a prompt.

        Parameters
        ----------
        prompt : str or sequence of int
            Text, or token ids as they are.
        **options
            See `Options`: ``max_tokens``, ``temperature``, ``top_k``, ``top_p``, ``min_p``,
            ``repetition_penalty``, ``seed``, ``stop``, ``ignore_eos``, ``adapter``.

        Raises
        ------
        UsageError
            The prompt is empty or too long, or an option is out of its range.

        """
        return self.generate_batch([prompt], **options)[0]

    def generate_batch(
        self, prompts: Sequence[str | Sequence[int]], **options: Unpack[Options]
    ) -> list[Generation]:
        """Continue several prompts, up to `max_batch` of them at once.

        Every prompt gets the same options, the seed too: each answer is what `generate` gives.
        """
        requests = [self._request(prompt, options) for prompt in prompts]
        for _ in in_slices(self._session, self._steps(requests)):
            pass
        return [request.result() for request in requests]

    def stream(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> TextStream:
        """Continue a prompt, giving the text in pieces as it comes; options as in `generate`."""
        return self._stream(self._request(prompt, options))

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]) -> Generation:
        """Answer a conversation.

        Parameters
        ----------
        messages : sequence of mappings
            Each with a ``role`` (system, user, assistant) and its ``content``.
        **options
            As in `generate`.

        Raises
        ------
        UsageError
            The model has no chat template, or its template refuses the messages.

        """
        stream = self.stream_chat(messages, **options)
        for _ in stream:
            pass
        return stream.result

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> TextStream:
        """Answer a conversation, giving the text in pieces as it comes."""
        return self._stream(self._chat_request(messages, options))

    def conversation(self) -> Conversation:
        """Begin a conversation whose tokens stay in the cache between its answers."""
        return Conversation(self._session, self._chat_request)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Write a conversation as the prompt that the model's own template makes of it."""
        return self._template().render(messages, **variables)

    def tokenize_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Turn a conversation into token ids.

        Only the template writes special tokens: one that is spelled out in a message, such as
        ``<|im_end|>``, is read as plain text.
        """
        parts = self._template().render_parts(messages, self._special, **variables)
        ids: list[int] = []
        try:
            for text, plain in parts:
                self.tokenizer.encode_special_tokens = plain
                ids += self.tokenize(text, add_special_tokens=False)
        finally:
            self.tokenizer.encode_special_tokens = False
        return ids

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids, with what the model puts at the start of a text.

        Raises
        ------
        UsageError
            The text has lone surrogates, which Python makes of bytes that are not UTF-8.

        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"The text is not UTF-8: its character {error.start} stands for no character."
            ) from None
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn token ids into text."""
        text: str = self.tokenizer.decode(
            [int(i) for i in token_ids], skip_special_tokens=skip_special_tokens
        )
        return text

    def score(self, token_ids: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """Yield the logits that follow each token: float32 [r, V] blocks, together [n, V]."""
        return self._session.score(token_ids, self.adapter)

    def session(
        self,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        max_batch: int | None = None,
    ) -> Session:
        """Open a session of one's own: the passes and the cache, without text and sampling."""
        return Session(
            self._program, threads=threads, context_length=context_length, max_batch=max_batch
        )

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that a request can choose."""
        return self._session.adapters.names

    @property
    def variant(self) -> str:
        """Target name of the code that runs."""
        return self._program.variant.target.name

    @property
    def device(self) -> Device:
        """Where the code runs."""
        return self._program.device

    @property
    def memory(self) -> MemorySum | None:
        """What is taken of a GPU's memory; None on a CPU."""
        return self._session.memory

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._session.context_length

    @property
    def threads(self) -> int:
        """Worker threads in use."""
        return self._session.threads

    def close(self) -> None:
        """Free the cache and the threads."""
        self._session.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise UsageError(
                "This model has no chat template, so it cannot chat; give it a prompt to continue "
                "instead (gqsa run)."
            )
        return self.chat_template

    def _request(self, prompt: str | Sequence[int], options: Options) -> Request:
        options = {"adapter": self.adapter, **options}
        self._session.adapters.check(options["adapter"])
        text = isinstance(prompt, str)
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        return Request(
            self._session.check_tokens(ids).tolist(),
            options,
            self.generation_config,
            tokenizer=self.tokenizer,
            eos=self.eos_token_ids,
            vocab_size=self._session.vocab_size,
            context_length=self.context_length,
            continues=text,
        )

    def _chat_request(self, messages: Sequence[Mapping[str, Any]], options: Options) -> Request:
        return self._request(self.tokenize_chat(messages), options)

    def _stream(self, request: Request) -> TextStream:
        return TextStream(request, in_slices(self._session, self._steps([request])))

    def _steps(self, requests: Sequence[Request]) -> Generator[tuple[Request, str], None, None]:
        """Advance requests together, starting a waiting one wherever one has finished."""
        session = self._session
        waiting, running = deque(requests), list[Request]()
        try:
            while waiting or running:
                while waiting and len(running) < session.max_batch:
                    request = waiting.popleft()
                    request.start()
                    request.sequence = session.add(request.adapter)
                    running.append(request)
                    for logits in session.prefill_chunks(request.sequence, request.prompt):
                        yield request, "" if logits is None else request.accept(logits)
                    running = self._retire(running)
                if running:
                    for request, logits in zip(running, advance(session, running), strict=True):
                        yield request, request.accept(logits)
                    running = self._retire(running)
        finally:
            for request in running:
                session.remove(request.sequence)

    def _retire(self, running: list[Request]) -> list[Request]:
        for request in running:
            if request.finish_reason is not None:
                self._session.remove(request.sequence)
        return [request for request in running if request.finish_reason is None]

    def _eos(self, tokenizer_config: Mapping[str, Any]) -> frozenset[int]:
        """Unite what the files call the end: models disagree with themselves about it."""
        configured = self.generation_config.get("eos_token_id")
        token = special_tokens(tokenizer_config).get("eos_token")
        candidates: list[Any] = [
            *self.manifest.model.eos_token_ids,
            *(configured if isinstance(configured, list) else [configured]),
            None if token is None else self.tokenizer.token_to_id(token),
        ]
        return frozenset(i for i in candidates if isinstance(i, int))


def _read_json(path: Path) -> dict[str, Any]:
    """Read an optional file of settings; empty where there is none."""
    try:
        data = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(data, dict):
        raise ArtefactError(f"{path} should hold one JSON object.")
    return data
