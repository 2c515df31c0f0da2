"""Attention over a KV cache of float32 and of float16, side by side.

``TVM_NUM_THREADS=1 python tools/bench_kv_cache.py`` times decoding of one token;
``--prefill 256`` the attention of that many new tokens over the cache. Times are one thread's CPU
time, which other work on the machine disturbs less; ratios are the medians of pairs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gqsa_compiler._tvm import Target, tvm
from gqsa_compiler.schedules.generic.attention_common import AttentionShape
from gqsa_compiler.schedules.generic.attention_decode import attention_decode
from gqsa_compiler.schedules.generic.attention_prefill import attention_prefill
from gqsa_compiler.schedules.generic.config import has_native_half
from gqsa_compiler.schedules.generic.emit import vector_lanes
from gqsa_compiler.targets import parse_target

MODELS = ((32, 8, 64), (9, 3, 64))  # query heads, key/value heads, features: Llama 1B, SmolLM2
CONTEXTS = (512, 4096, 8192)
PAGE = 16
LAYERS = 4  # caches in turn, so that a small one does not stay in the first-level cache
REPEATS = 21


def kernel(heads: tuple[int, int, int], half: bool, prefill: bool) -> Any:
    """Compile attention over the pages for this machine."""
    cpu = parse_target("cpu")
    shape = AttentionShape(
        *heads, PAGE, 0, vector_lanes(cpu), half=half, native_half=has_native_half(cpu)
    )
    built = attention_prefill(shape, paged=True) if prefill else attention_decode(shape)
    module = tvm.IRModule({"main": built.with_attr("global_symbol", "main")})
    return tvm.compile(module, Target(cpu.tvm_dict()))["main"]


def call(heads: tuple[int, int, int], context: int, new: int, half: bool) -> Callable[[], None]:
    """Return a call of the kernel on each of `LAYERS` random caches; 0 new tokens: decode."""
    function = kernel(heads, half, new > 0)
    rng = np.random.default_rng(0)

    def table(*numbers: int) -> Any:
        return tvm.runtime.tensor(np.array(numbers, np.int32))

    arguments = []
    rows, count = max(new, 1), context // PAGE
    for _ in range(LAYERS):
        pages = rng.standard_normal((count, 2, heads[1], PAGE, heads[2])).astype(np.float32)
        if half:
            narrow = pages.astype(np.float16)
            pages.reshape(-1).view(np.float16)[: narrow.size] = narrow.reshape(-1)
        q = rng.standard_normal((rows, heads[0], heads[2])).astype(np.float32)
        outputs = [np.zeros_like(q), np.zeros(q.shape[:2], np.float32)]
        arguments.append(
            [
                tvm.runtime.tensor(q),
                *([table(0, rows)] if new else []),
                tvm.runtime.tensor(pages),
                *(table(0, count), table(*range(count)), table(PAGE), table(0)),
                table(*range(context, context + rows)),
                *(tvm.runtime.tensor(x) for x in outputs),
                *([0] if new else []),  # not causal: every key is an earlier one
                *(0, 1.0, 1e4, heads[2] ** -0.5),
            ]
        )

    def run() -> None:
        for each in arguments:
            function(*each)

    return run


def seconds(function: Callable[[], None], times: int) -> float:
    """Time one call."""
    begin = time.thread_time()
    for _ in range(times):
        function()
    return (time.thread_time() - begin) / times


def main() -> None:
    """Print a line for every model and context."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefill", type=int, default=0, help="new tokens; 0: decode one")
    new = parser.parse_args().prefill
    print("heads       context   float32     float16   ratio (quartiles)")
    for heads in MODELS:
        for context in CONTEXTS:
            calls = [call(heads, context, new, half) for half in (False, True)]
            times = max(1, int(0.02 / min(seconds(each, 2) for each in calls)))
            pairs = []
            for i in range(REPEATS):
                order = (0, 1) if i % 2 else (1, 0)
                found = {which: seconds(calls[which], times) / LAYERS for which in order}
                pairs.append((found[0], found[1]))
            wide, narrow = np.median(pairs, axis=0) * 1e6
            low, ratio, high = np.quantile([a / b for a, b in pairs], (0.25, 0.5, 0.75))
            print(
                f"{'/'.join(map(str, heads)):<10}{context:>9}{wide:>8.0f} us {narrow:>8.0f} us"
                f"   {ratio:.2f} ({low:.2f} to {high:.2f})"
            )


if __name__ == "__main__":
    main()
