"""Where the time of a token goes, kernel by kernel.

TVM's virtual machine can report each call before and after it is made. Runs in a session that does
so and in one that does not take turns. What is left of the unprofiled time when kernels, sampling
and detokenisation are taken away was spent in the machine itself, in the cache's bookkeeping and in
Python.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gqsa_compiler.progress import Progress
from gqsa_compiler.trace import ATTENTION, Key, Trace

if TYPE_CHECKING:
    from gqsa_compiler.runtime.engine import Session
    from gqsa_compiler.runtime.model import Model
    from gqsa_compiler.runtime.schema import Kernel

Kind = Literal["linear", "kernel", "attention", "sampling", "detokenisation", "rest"]

SAMPLING, DETOKENISATION = "sampling", "detokenisation"
REST = "VM, KV cache bookkeeping, Python"


@dataclass(frozen=True)
class ProfileLine:
    """One kernel, its calls of all layers together, or another part of a token's time.

    Parameters
    ----------
    name : str
        Of a linear kernel what its layers are called, without block numbers (``gate_up``); of
        another kernel its function in ``model.so``.
    kind : str
        ``linear`` (in the manifest's list), ``kernel`` (any other), ``attention``, ``sampling``,
        ``detokenisation`` or ``rest``.
    calls : float
        In one token or prompt.
    microseconds : float
        In one token or prompt. Each call's time has about half a microsecond of measuring in it.
    share : float
        Of the unprofiled time.
    kernel, weight : str or None
        The rule and the kind of weights; these and what follows of linear kernels only.
    n, k : int or None
        Shape [N, K] of the weights.
    sparsity : float or None
        Mean over the layers.
    layers : int or None
        Layers that it serves.
    bytes : int or None
        Weight bytes that its calls read in one token; None for a prompt, where tokens share them.
    bytes_per_second : float or None
        The rate at which it read them.

    """

    name: str
    kind: Kind
    calls: float
    microseconds: float
    share: float
    kernel: str | None = None
    weight: str | None = None
    n: int | None = None
    k: int | None = None
    sparsity: float | None = None
    layers: int | None = None
    bytes: int | None = None
    bytes_per_second: float | None = None


@dataclass(frozen=True)
class PhaseProfile:
    """The time of one decoded token, or of one prompt.

    Parameters
    ----------
    tokens : int
        In the pass or passes: 1, or the prompt's.
    microseconds : float
        Unprofiled; the sum of all lines.
    profiled_microseconds : float
        The same work while it is profiled.
    lines : tuple of ProfileLine
        Kernels, longest first; then sampling, detokenisation and the rest. The rest is below 0
        where the profiled runs were disturbed and the others were not.

    """

    tokens: int
    microseconds: float
    profiled_microseconds: float
    lines: tuple[ProfileLine, ...]


@dataclass(frozen=True)
class Profile:
    """Where time goes when a token is decoded and when a prompt is read."""

    decode: PhaseProfile
    prefill: PhaseProfile


@dataclass(frozen=True)
class _Sample:
    """One token or prompt, in nanoseconds."""

    total: float
    times: Mapping[Key, float]
    calls: Mapping[Key, float]


@dataclass(frozen=True)
class _Run:
    prefill: _Sample
    decode: tuple[_Sample, ...]


def profile_model(
    model: Model,
    prompt: Sequence[int],
    gen: int,
    *,
    repeats: int = 5,
    progress: Progress | None = None,
) -> Profile:
    """Measure a loaded artefact, in sessions of its own.

    Parameters
    ----------
    model : Model
        The loaded artefact.
    prompt : sequence of int
        Token ids.
    gen : int
        Tokens to generate greedily, at least two; the first comes with the prompt.
    repeats : int
        Runs of either kind that count, after one that does not. The figures are medians, over
        their decoded tokens and over their prompts.
    progress : callable, optional
        Called with (stage, done, total).

    Raises
    ------
    ArtefactError
        The artefact's code does not report its calls.

    """
    say = progress or (lambda stage, done, total: None)
    plain: list[_Run] = []
    profiled: list[_Run] = []
    limits: dict[str, int] = {"context_length": model.context_length, "max_batch": 1}
    with ExitStack() as stack:
        sessions = [model.session(threads=model.threads, **limits) for _ in range(2)]
        for session in sessions:
            stack.callback(session.close)
        trace = Trace(model.manifest, sessions[1].parameter_addresses)
        sessions[1].set_instrument(trace)
        for index in range(repeats + 1):
            say("Profiled runs", index, repeats + 1)
            plain.append(_run(model, sessions[0], None, prompt, gen))
            profiled.append(_run(model, sessions[1], trace, prompt, gen))
    say("Profiled runs", repeats + 1, repeats + 1)
    plain, profiled = plain[1:], profiled[1:]
    kernels = model.manifest.kernels
    return Profile(
        decode=_phase(
            kernels,
            [sample for run in plain for sample in run.decode],
            [sample for run in profiled for sample in run.decode],
            tokens=1,
        ),
        prefill=_phase(
            kernels,
            [run.prefill for run in plain],
            [run.prefill for run in profiled],
            tokens=len(prompt),
        ),
    )


def _run(
    model: Model, session: Session, trace: Trace | None, prompt: Sequence[int], gen: int
) -> _Run:
    """Do what `Model.generate` does, with a clock around each part."""
    from gqsa_compiler.runtime.sampling import Sampler, SamplingOptions
    from gqsa_compiler.runtime.tokens import TextDecoder

    clock = time.perf_counter_ns
    sampler = Sampler(SamplingOptions(), model.manifest.model.vocab_size, list(prompt))
    decoder = TextDecoder(model.tokenizer)

    def sample(total: int, **own: int) -> _Sample:
        times, calls = trace.take() if trace else ({}, {})
        for name, spent in own.items():
            times[name], calls[name] = spent, 1
        return _Sample(total, times, calls)

    sequence = session.add()
    try:
        start = clock()
        logits = session.prefill(sequence, prompt)
        ready = clock()
        token = sampler(logits)
        end = clock()
        prefill = sample(end - start, sampling=end - ready)
        decode = []
        for _ in range(gen - 1):
            start = clock()
            decoder.push(token)
            written = clock()
            logits = session.decode([sequence], [token])[0]
            ready = clock()
            token = sampler(logits)
            end = clock()
            decode.append(sample(end - start, sampling=end - ready, detokenisation=written - start))
    finally:
        session.remove(sequence)
    return _Run(prefill, tuple(decode))


def _phase(
    kernels: Sequence[Kernel],
    plain: Sequence[_Sample],
    samples: Sequence[_Sample],
    tokens: int,
) -> PhaseProfile:
    total = statistics.median(sample.total for sample in plain) / 1e3
    groups: dict[tuple[object, ...], list[Key]] = defaultdict(list)
    for key in dict.fromkeys(key for sample in samples for key in sample.times):
        k = kernels[key] if isinstance(key, int) else None
        groups[(role(k.layer), k.kernel, k.weight, k.n, k.k) if k else (key,)].append(key)
    lines = [_line(kernels, samples, keys, tokens, total) for keys in groups.values()]
    lines.sort(key=lambda line: (line.kind in (SAMPLING, DETOKENISATION), -line.microseconds))
    rest = total - sum(line.microseconds for line in lines)
    lines.append(ProfileLine(REST, "rest", 1.0, rest, rest / total))
    profiled = statistics.median(sample.total for sample in samples) / 1e3
    return PhaseProfile(tokens, total, profiled, tuple(lines))


def _line(
    kernels: Sequence[Kernel],
    samples: Sequence[_Sample],
    keys: Sequence[Key],
    tokens: int,
    total: float,
) -> ProfileLine:
    def median(parts: Sequence[Mapping[Key, float]]) -> float:
        return statistics.median(sum(part.get(key, 0.0) for key in keys) for part in parts)

    time_us = median([sample.times for sample in samples]) / 1e3
    calls = median([sample.calls for sample in samples])
    served = [kernels[key] for key in keys if isinstance(key, int)]
    if not served:
        name = str(keys[0])
        kinds: dict[str, Kind] = {
            ATTENTION: "attention", SAMPLING: "sampling", DETOKENISATION: "detokenisation",
        }  # fmt: skip
        return ProfileLine(name, kinds.get(name, "kernel"), calls, time_us, time_us / total)
    first = served[0]
    read = sum(kernel.bytes for kernel in served) if tokens == 1 else None
    return ProfileLine(
        role(first.layer),
        "linear",
        calls,
        time_us,
        time_us / total,
        kernel=first.kernel,
        weight=first.weight,
        n=first.n,
        k=first.k,
        sparsity=statistics.fmean(kernel.sparsity for kernel in served),
        layers=len(served),
        bytes=read,
        bytes_per_second=None if read is None else read / time_us * 1e6,
    )


def role(layer: str) -> str:
    """Name what a layer is for, without its block: ``gate_up`` of ``model.layers.3.mlp.{...}``."""
    leaves = [part.rpartition(".")[2].strip("{}") for part in layer.split("+")]
    # A tied embedding is in the list of kernels because it is the head.
    return "_".join("lm_head" if x == "embed_tokens" else x.removesuffix("_proj") for x in leaves)
