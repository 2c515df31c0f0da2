"""Launches of small kernels, and numbers that their threads and blocks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.device import barrier, register, warp_sum
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, load, store

THREADS = 256
"""Of a block that has nothing to share."""


def i32(value: int) -> Expr:
    """Return an int32 constant."""
    return const(value, "int32")


def each(count: Expr, body: Callable[[Expr], None]) -> None:
    """Launch a thread for each of `count` (int64) pieces of work; `body` takes its int64 number."""
    blocks = B.floordiv(count + const(THREADS - 1, "int64"), const(THREADS, "int64"))
    with (
        B.thread_binding(0, blocks, thread="blockIdx.x") as block,
        B.thread_binding(0, THREADS, thread="threadIdx.x") as thread,
    ):
        number = B.Cast("int64", block) * const(THREADS, "int64") + B.Cast("int64", thread)
        number = B.bind(number)
        with B.If(number < count), B.Then():
            body(number)


@dataclass(frozen=True)
class Thread:
    """Where a thread is within its block, int32."""

    number: Expr
    lane: Expr
    warp: Expr

    @classmethod
    def of(cls, thread: Expr) -> Thread:
        """Emit the numbers of ``threadIdx.x``."""
        number = B.bind(B.Cast("int32", thread))
        lane = B.bind(B.floormod(number, i32(WARP)))
        return cls(number, lane, B.bind(B.floordiv(number, i32(WARP))))


@contextmanager
def one_block_each(count: Expr, threads: int) -> Iterator[tuple[Expr, Thread]]:
    """Launch a block for each of `count` pieces of work: its int64 number, and the thread."""
    with (
        B.thread_binding(0, count, thread="blockIdx.x") as block,
        B.thread_binding(0, threads, thread="threadIdx.x") as thread,
    ):
        yield B.bind(B.Cast("int64", block)), Thread.of(thread)


def block_sum(value: Expr, partial: Buffer, warps: int, thread: Thread) -> Expr:
    """Sum a float32 over the threads of a block, in a fixed order; every thread gets it.

    Parameters
    ----------
    partial : Buffer
        float32 [warps], shared; free again after the next barrier.
    """
    sums = register(value, "float32")
    warp_sum(sums, 1, thread.lane)
    with B.If(thread.lane == i32(0)), B.Then():
        store(partial, load(sums, 0), thread.warp)
    barrier()
    total = register(load(partial, 0), "float32")
    for warp in range(1, warps):
        store(total, load(total, 0) + load(partial, warp), 0)
    return B.bind(load(total, 0))
