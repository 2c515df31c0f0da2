"""Speed and memory of an artefact on this machine."""

from __future__ import annotations

import resource
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gqsa_compiler.bandwidth import measure_read_bandwidth
from gqsa_compiler.errors import UsageError
from gqsa_compiler.profile import Profile, profile_model
from gqsa_compiler.progress import Progress


@dataclass(frozen=True)
class BenchRun:
    """One timed run."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float


@dataclass(frozen=True)
class BenchResult:
    """What `bench_artefact` measured; rates are medians of the runs.

    Parameters
    ----------
    prefill_tokens_per_second, decode_tokens_per_second : float
        Reading the prompt, and writing after it, sampling and detokenising included.
    first_token_seconds : float
        From the request to its first token.
    bytes_per_token : int
        Weight bytes that one decoded token reads, by the manifest. The KV cache is not in it.
    read_bandwidth : float
        Bytes a second that this machine's threads can read, measured here.
    read_bandwidth_share : float
        ``bytes_per_token * decode_tokens_per_second / read_bandwidth``.
    peak_memory_bytes : int
        Largest resident size of the process until the last run, the mapped weights included.
    prompt, gen, threads : int
        Tokens in the prompt, tokens generated (the first comes with the prompt, so one pass less
        is timed as decoding), and CPU threads.
    variant : str
        Target name of the code that ran.
    runs : tuple of BenchRun
        Every timed run, in order.
    profile : Profile, optional
        Where the time goes, if that was asked for.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    bytes_per_token: int
    read_bandwidth: float
    read_bandwidth_share: float
    peak_memory_bytes: int
    prompt: int
    gen: int
    threads: int
    variant: str
    runs: tuple[BenchRun, ...]
    profile: Profile | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists; `profile` only where there is one."""
        found = asdict(self)
        if self.profile is None:
            del found["profile"]
        return found


def bench_artefact(
    directory: str | Path,
    *,
    prompt: int = 128,
    gen: int = 64,
    repeats: int = 5,
    threads: int | None = None,
    verify: bool = True,
    profile: bool = False,
    adapter: str | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Time an artefact.

    A prompt of random tokens is read and ``gen`` more are generated greedily, ``repeats`` times
    after one run that is not counted.

    Parameters
    ----------
    directory : str or Path
        The artefact.
    prompt, gen : int
        Tokens to read, at least one, and to write, at least two.
    repeats : int
        Timed runs.
    threads : int, optional
        CPU threads; one for every core this process may use by default.
    verify : bool
        Check the parameters' hashes first; that of the library always is.
    profile : bool
        Then repeat the runs with a clock around every kernel; not with an adapter.
    adapter : str, optional
        One of the artefact's; the model alone unless given.
    variant : str, optional
        Target name of the code to run; the best that this machine can run unless given.
    progress : callable, optional
        Called with (stage, done, total).

    Raises
    ------
    UsageError
        The artefact's context is too short, or it has no such adapter.
    ArtefactError
        It cannot be loaded.
    """
    from gqsa_compiler.runtime import load
    from gqsa_compiler.runtime.manifest import Manifest

    say = progress or (lambda stage, done, total: None)
    manifest = Manifest.read(directory)
    length = prompt + gen
    if length > manifest.model.context_length:
        raise UsageError(
            f"A prompt of {prompt} and {gen} generated tokens need a context of {length}, and "
            f"{directory} was compiled for {manifest.model.context_length}; ask for fewer, or "
            "compile it with a larger --context."
        )
    say("Loading the artefact", 0, 0)
    runs: list[BenchRun] = []
    if profile and adapter is not None:
        raise UsageError("--profile knows the model's own kernels only; leave --adapter out.")
    with load(
        directory,
        threads=threads,
        verify=verify,
        context_length=length,
        max_batch=1,
        variant=variant,
        adapter=adapter,
    ) as model:
        used, variant, device = model.threads, model.variant, model.device
        if profile and not device.is_cpu:
            raise UsageError(
                "--profile times the calls of a CPU's kernels; a GPU's run after their calls have "
                "returned. Leave it out."
            )
        ids = np.random.default_rng(0).integers(0, manifest.model.vocab_size, prompt).tolist()
        for index in range(repeats + 1):
            say("Timed runs", index, repeats + 1)
            found = model.generate(ids, max_tokens=gen, temperature=0.0, ignore_eos=True)
            times = found.timings
            runs.append(
                BenchRun(
                    times.prefill_tokens_per_second,
                    times.decode_tokens_per_second,
                    times.first_token_seconds,
                )
            )
        say("Timed runs", repeats + 1, repeats + 1)
        # Before the profile's own cache and the bandwidth's own buffer are made.
        peak = _peak_memory_bytes()
        timed = tuple(runs[1:])
        decode = statistics.median(run.decode_tokens_per_second for run in timed)
        first = statistics.median(run.first_token_seconds for run in timed)
        found_profile = None
        if profile:
            found_profile = profile_model(
                model,
                ids,
                gen,
                repeats=repeats,
                progress=say,
            )
    read = manifest.bytes_per_token + manifest.adapter_bytes(adapter)
    say("Measuring the memory's read bandwidth", 0, 0)
    bandwidth = measure_read_bandwidth(used) if device.is_cpu else device.copy_bandwidth()
    return BenchResult(
        prefill_tokens_per_second=statistics.median(r.prefill_tokens_per_second for r in timed),
        decode_tokens_per_second=decode,
        first_token_seconds=first,
        bytes_per_token=read,
        read_bandwidth=bandwidth,
        read_bandwidth_share=read * decode / bandwidth,
        peak_memory_bytes=peak,
        prompt=prompt,
        gen=gen,
        threads=used,
        variant=variant,
        runs=timed,
        profile=found_profile,
    )


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
