"""One stopwatch for both sides of `bench_llamacpp.py`: the same tokens, the same calls.

Only the standard library: the llama.cpp side may run in a Python that has nothing else.
"""

from __future__ import annotations

import argparse
import math
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Work:
    """What is timed.

    Parameters
    ----------
    prompt, gen : int
        Decoding: tokens in the cache before it, and single-token passes.
    prefill : int
        Prefill: tokens of one prompt; only the last one's logits are asked for.
    threads : int
    """

    prompt: int
    gen: int
    prefill: int
    threads: int

    @property
    def context(self) -> int:
        """Tokens that the longest sequence has."""
        return max(self.prompt + self.gen, self.prefill)

    def words(self) -> list[str]:
        """Return the command line that `read_work` understands."""
        fields = vars(self).items()
        return [word for name, value in fields for word in (f"--{name}", str(value))]


class Engine(Protocol):
    """A loaded model with one sequence; every call returns when its work is done."""

    vocab_size: int

    def reset(self) -> None:
        """Forget all tokens."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Append tokens and compute the last one's logits."""

    def decode(self, token: int) -> None:
        """Append one token and compute its logits."""

    def logits(self) -> Sequence[float]:
        """Return the logits of the last call."""


def add_work(parser: argparse.ArgumentParser, threads: int | None = None) -> None:
    """Give a parser the options of `Work`; `threads` is the default, if there is to be one."""
    parser.add_argument("--prompt", type=positive, default=128, help="tokens before decoding")
    parser.add_argument("--gen", type=positive, default=64, help="tokens decoded")
    parser.add_argument("--prefill", type=positive, default=512, help="tokens of a prefill")
    parser.add_argument(
        "--threads", type=positive, default=threads, required=threads is None, help="CPU threads"
    )


def read_work(options: argparse.Namespace) -> Work:
    """Return the options that `add_work` has defined."""
    return Work(options.prompt, options.gen, options.prefill, options.threads)


def positive(text: str) -> int:
    """Read an integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def measure(engine: Engine, work: Work) -> dict[str, Any]:
    """Time one prefill and one decoding, after a warm-up that is not counted.

    The tokens are random and known beforehand, so that both sides read the same embeddings and
    neither pays for sampling.
    """
    ids = random.Random(0)
    prompt = [ids.randrange(engine.vocab_size) for _ in range(max(work.prompt, work.prefill))]
    answer = [ids.randrange(engine.vocab_size) for _ in range(work.gen)]
    engine.prefill(prompt[: work.prefill])
    engine.reset()
    engine.prefill(prompt[: work.prompt])
    for token in answer[:_WARM_UP_STEPS]:
        engine.decode(token)

    engine.reset()
    begin = time.perf_counter()
    engine.prefill(prompt[: work.prefill])
    prefill_seconds = time.perf_counter() - begin
    engine.reset()
    engine.prefill(prompt[: work.prompt])
    begin = time.perf_counter()
    for token in answer:
        engine.decode(token)
    decode_seconds = time.perf_counter() - begin

    if not all(math.isfinite(value) for value in engine.logits()):
        sys.exit("The logits are not finite, so the speed means nothing; check the weights.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "prefill_tokens_per_second": work.prefill / prefill_seconds,
        "decode_tokens_per_second": work.gen / decode_seconds,
        "peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024,
    }
