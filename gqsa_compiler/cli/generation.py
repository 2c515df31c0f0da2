"""What `run` and `chat` share: options, loading, figures."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from gqsa_compiler.cli import options
from gqsa_compiler.cli.console import note, progress
from gqsa_compiler.errors import UsageError

if TYPE_CHECKING:
    from gqsa_compiler.runtime import Generation, Model

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")


@dataclass(frozen=True)
class Shared:
    """The options of every verb that generates text: each field is one."""

    temperature: options.Temperature = None
    top_k: options.TopK = None
    top_p: options.TopP = None
    min_p: options.MinP = None
    repetition_penalty: options.RepetitionPenalty = None
    seed: options.Seed = None
    stop: options.Stop = None
    adapter: options.Adapter = None
    context: options.Context = None
    threads: options.Threads = None
    variant: options.Variant = None
    no_verify: options.NoVerify = False
    json: options.Json = False
    verbose: options.Verbose = False

    def sampling(self) -> dict[str, Any]:
        """Return the sampling options that the user gave; the model's own stand for the others."""
        values = {name: getattr(self, name) for name in _SAMPLING}
        return {name: value for name, value in values.items() if value not in (None, [])}

    def settings(self) -> dict[str, Any]:
        """Return what of these the verb says at its start."""
        names = ("adapter", "context", "threads", "variant")
        return {**self.sampling(), **{name: getattr(self, name) for name in names}}


def generates(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of `Shared`, after its own; it takes them as its last, ``shared``."""

    @functools.wraps(function)
    def wrapper(**arguments: Any) -> None:
        shared = Shared(**{field.name: arguments.pop(field.name) for field in fields(Shared)})
        function(**arguments, shared=shared)

    # Typer reads the options off the signature and the annotations.
    hints = get_type_hints(Shared, include_extras=True)
    own = list(inspect.signature(function, eval_str=True).parameters.values())[:-1]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    added = [
        inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
        for field in fields(Shared)
    ]
    signature = inspect.Signature([*own, *added], return_annotation=None)
    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return wrapper


def load_one(directory: Path, shared: Shared, rpc: str | None = None) -> Model:
    """Load an artefact for one sequence: its cache holds one context, not a whole batch.

    `rpc` is the address of the device to load it on, other than this machine.
    """
    if rpc is not None:
        return _load_remote(directory, shared, rpc)
    from gqsa_compiler.runtime import load

    # Checking the hashes of a large model reads gigabytes.
    with progress(transient=True) as report_progress:
        report_progress("Loading the model", 0, 0)
        model = load(
            directory,
            threads=shared.threads,
            verify=not shared.no_verify,
            context_length=shared.context,
            max_batch=1,
            variant=shared.variant,
            adapter=shared.adapter,
        )
    if len(model.manifest.variants) > 1:
        note(f"Running the code for {model.variant}.")
    if model.memory is not None:
        note(model.memory.text())
    return model


def _load_remote(directory: Path, shared: Shared, rpc: str) -> Model:
    from gqsa_compiler.remote import load_remote, parse_address

    if shared.threads is not None:
        raise UsageError(
            "--threads is for this machine; the device has as many as its server was given "
            "(TVM_NUM_THREADS)."
        )
    if shared.adapter is not None:
        raise UsageError(
            "Over RPC no adapter can be chosen; compile the model with --merge-adapter."
        )
    if shared.variant is not None:
        raise UsageError("Over RPC the code that asks for least runs; leave --variant out.")
    parse_address(rpc)
    with progress(transient=True) as report_progress:
        return load_remote(
            directory,
            rpc,
            verify=not shared.no_verify,
            context_length=shared.context,
            max_batch=1,
            progress=report_progress,
        )


def figures(result: Generation) -> str:
    """Say in one line how fast an answer came and why it ended."""
    times = result.timings
    text = f"prompt {result.prompt_tokens} tokens"
    if result.cached_tokens:
        text += f" ({result.cached_tokens} in the cache)"
    text += f", {times.prefill_tokens_per_second:.1f} tokens/s"
    if times.generated_tokens > 1:
        text += (
            f"; generated {times.generated_tokens} tokens, "
            f"{times.decode_tokens_per_second:.1f} tokens/s"
        )
    else:
        text += f"; generated {times.generated_tokens} tokens"
    return f"[{text}; ended by {result.finish_reason}]"


def as_dict(result: Generation) -> dict[str, Any]:
    """Return an answer as plain data for --json."""
    times = result.timings
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "generated_tokens": times.generated_tokens,
        "first_token_seconds": times.first_token_seconds,
        "prefill_tokens_per_second": times.prefill_tokens_per_second,
        "decode_tokens_per_second": times.decode_tokens_per_second,
    }
