"""The fastest that this machine computes: loops that touch nothing but registers.

Two ceilings of a roofline: float32 multiply-adds, which every CPU has, and on x86-64 the 16-bit dot
products that the sparse kernels there are made of.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqsa_compiler._tvm import B, tvm, tvm_ffi
from gqsa_compiler.runtime.cpus import allowed_cpus
from gqsa_compiler.runtime.workers import Workers
from gqsa_compiler.schedules.generic.emit import (
    argument,
    broadcast,
    cast,
    const,
    load,
    local,
    pick,
    scheduled,
    store,
    vector,
    vector_lanes,
)
from gqsa_compiler.schedules.generic.math import fma
from gqsa_compiler.targets import TargetSpec, parse_target

# Enough for two units of four or five cycles each, and few enough for 16 registers.
_CHAINS = 12
_TURNS = 1 << 22
_PASSES = 15


@dataclass(frozen=True)
class _Loop:
    """What one kind of loop works on.

    Parameters
    ----------
    factor, sums : str
        Dtypes.
    products : int
        Of a lane in a turn; a product and its addition are two operations.
    """

    factor: str
    sums: str
    products: int


_LOOPS = {"float32": _Loop("float32", "float32", 1), "int16": _Loop("int16", "int32", 2)}


def measure_peaks(threads: int, turns: int = _TURNS) -> dict[str, float]:
    """Measure the operations a second of all threads together.

    Parameters
    ----------
    threads : int
    turns : int
        Length of the loops. The best of a few passes counts: the others were disturbed.

    Returns
    -------
    dict
        ``float32`` and, on x86-64 with AVX2, ``int16``.
    """
    target = parse_target("cpu")
    kinds = ["float32"]
    if target.arch == "x86_64" and target.vector_bits >= 256:
        kinds.append("int16")
    workers = Workers.share(allowed_cpus()[:threads])
    try:
        return {kind: _peak(_LOOPS[kind], target, workers, threads, turns) for kind in kinds}
    finally:
        workers.release()


def _peak(loop: _Loop, target: TargetSpec, workers: Workers, threads: int, turns: int) -> float:
    lanes = vector_lanes(target)
    function = _build(loop, target, threads, turns)
    # Factors below one: the sums stay finite, and far from the slow numbers next to zero.
    factor = np.full(lanes * loop.products, 0.5 if loop.factor == "float32" else 3, loop.factor)
    out = np.zeros((threads, _CHAINS * lanes), loop.sums)
    arguments = [tvm_ffi.from_dlpack(tvm.runtime.tensor(array)) for array in (factor, out)]
    best = min(workers.call(_seconds, function, arguments) for _ in range(_PASSES))
    return 2 * loop.products * lanes * _CHAINS * turns * threads / best


def _seconds(function: Callable[..., None], arguments: list[Any]) -> float:
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def _build(loop: _Loop, target: TargetSpec, threads: int, turns: int) -> Any:
    """Compile the loop: every thread has sums of its own that do not wait for each other."""
    lanes = vector_lanes(target)
    with scheduled() as builder:
        factors = argument("factors", (lanes * loop.products,), loop.factor)
        out = argument("out", (threads, _CHAINS * lanes), loop.sums)
        with B.parallel(threads) as thread:
            sums = local(_CHAINS * lanes, loop.sums)
            factor = B.bind(load(factors, 0, lanes=lanes * loop.products))
            for chain in range(0, _CHAINS * lanes, lanes):
                # Different ones, or LLVM would compute a single chain.
                start = broadcast(const(1 + chain, loop.sums), lanes)
                store(sums, start, chain, lanes=lanes)
            with B.serial(turns):
                for chain in range(0, _CHAINS * lanes, lanes):
                    value = B.bind(load(sums, chain, lanes=lanes))
                    store(sums, _step(loop, value, factor, lanes), chain, lanes=lanes)
            for chain in range(0, _CHAINS * lanes, lanes):
                store(out, load(sums, chain, lanes=lanes), thread, chain, lanes=lanes)
    function = builder.get().with_attr({"global_symbol": "peak", "tirx.is_private": False})
    module = tvm.compile(
        tvm.IRModule({"peak": function}), target=tvm.target.Target(target.tvm_dict())
    )
    return module["peak"]


def _step(loop: _Loop, value: Any, factor: Any, lanes: int) -> Any:
    """Emit a sum's next value; the sum is a factor too, or LLVM would multiply only once."""
    if loop.products == 1:
        return fma(value, factor, factor)
    # LLVM makes one instruction of this: pmaddwd.
    pairs = B.reinterpret(vector("int16", 2 * lanes), value)
    products = B.bind(cast("int32", pairs, 2 * lanes) * cast("int32", factor, 2 * lanes))
    even, odd = (pick([products], range(first, 2 * lanes, 2)) for first in (0, 1))
    return value + (even + odd)
