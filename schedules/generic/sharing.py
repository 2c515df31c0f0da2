"""Tasks that the threads take as they come: none waits for one that was held up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import Expr, const, int64, load, local, store

# TIR has no atomic operations. What a task reads and writes needs no order among the others: the
# end of the parallel loop is a barrier.
_TAKE = "gqsa_take"
_HELPER = f"""
define i32 @{_TAKE}(ptr %next) {{
  %r = atomicrmw add ptr %next, i32 1 monotonic
  ret i32 %r
}}
"""


@contextmanager
def each_task(tasks: int) -> Iterator[Expr]:
    """Emit the block for every task from 0 to `tasks` - 1, int64, on all threads.

    Every thread has as many consecutive tasks as the others, as in any parallel loop. One that is
    through with its own goes on with those of others, from the last one backwards: a core that
    others use, or that waits longer for memory, does not keep the rest waiting.
    """
    taken = local(tasks, "int32")
    with B.serial(tasks) as i:
        store(taken, const(0, "int32"), i)
    with (
        B.attr(const(0, "int32"), "pragma_import_llvm", _HELPER),
        B.parallel(int64(0), int64(tasks)) as own,
    ):
        # A thread is at its last one when the task behind has been begun, by another.
        behind = load(taken, B.min(own + int64(1), int64(tasks - 1)))
        last = B.Or(own == int64(tasks - 1), behind != 0)
        # Not a `while`: what its body allocates would stay in memory.
        with B.serial(int64(0), B.bind(B.Select(last, int64(tasks + 1), int64(1)))) as i:
            task = B.bind(B.Select(i == int64(0), own, int64(tasks) - i))
            with B.If(load(taken, task) == 0), B.Then():
                before = B.call_extern("int32", _TAKE, B.address_of(taken[task]))
                with B.If(before == 0), B.Then():
                    yield task
