"""Tasks are done once each, whichever thread does them."""

from __future__ import annotations

import numpy as np
import pytest

from gqsa_compiler._tvm import B, Target, tvm
from gqsa_compiler.passes import cpu_code
from gqsa_compiler.schedules.generic.emit import (
    argument,
    const,
    int64,
    load,
    local,
    scheduled,
    store,
)
from gqsa_compiler.schedules.generic.sharing import each_task
from gqsa_compiler.targets import parse_target


@pytest.mark.parametrize("tasks", [1, 2, 3, 64])
def test_every_task_is_done_once(tasks: int) -> None:
    """The first ones take much longer than the rest: the other threads finish them."""
    with scheduled() as builder:
        work = argument("work", (tasks,), "int32")
        done = argument("done", (tasks,), "float32")
        with each_task(tasks) as task:
            total = local(1)
            store(total, const(0.0, "float32"), 0)
            with B.serial(int64(0), int64(load(work, task))) as i:
                store(total, load(total, 0) * const(0.5, "float32") + B.Cast("float32", i), 0)
            # Adds: a task that is done twice, or never, shows.
            store(done, load(done, task) + B.min(load(total, 0), const(0.0, "float32")) + 1.0, task)
    function = builder.get().with_attr("global_symbol", "main")
    target = Target(parse_target("cpu").tvm_dict())
    module = tvm.IRModule({"main": function})
    run = tvm.compile(module, target, tir_pipeline=cpu_code.register())["main"]
    work = np.full(tasks, 10, np.int32)
    work[: tasks // 2] = 200_000
    for _ in range(20):
        done = tvm.runtime.tensor(np.zeros(tasks, np.float32))
        run(tvm.runtime.tensor(work), done)
        np.testing.assert_array_equal(done.numpy(), 1)
