"""The frame of a sparse linear layer: tasks over the threads, tiles of tokens, rows, epilogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, int64, load, local, store
from gqsa_compiler.schedules.generic.epilogue import Outputs
from gqsa_compiler.schedules.generic.function import Arguments
from gqsa_compiler.schedules.generic.sharing import each_task
from gqsa_compiler.schedules.generic.tiles import TilePlan
from gqsa_compiler.schedules.spec import LinearSpec

Inputs = TypeVar("Inputs")
RowSums = Callable[[Inputs, Expr, Expr, int, Buffer, Expr], None]
"""``row_sums(inputs, row, token, tile, sums, at)`` emits the dot products of a stored row with
the `tile` tokens from `token` on, into ``sums[at:at + tile]``."""

OneToken = Callable[[Inputs, Outputs, Expr, Expr], None]
"""``one_token(inputs, outputs, start, end)`` emits the output features ``start`` to ``end``."""


@dataclass(frozen=True)
class ManyTokens:
    """Another way to compute many tokens than in tiles, row by row.

    Parameters
    ----------
    least : int
        Tokens from which it is used.
    prepare : callable
        Emits what happens to the activations first; returns what emits a task's output features
        ``emit(outputs, start, end)``.
    """

    least: int
    prepare: Callable[[], Callable[[Outputs, Expr, Expr], None]]


def emit_tasks(
    spec: LinearSpec,
    config: GenericConfig,
    args: Arguments,
    prepare: Callable[[TilePlan | None], Inputs],
    row_sums: RowSums[Inputs],
    in_task: Callable[[Inputs], Inputs] = lambda inputs: inputs,
    one_token: OneToken[Inputs] | None = None,
    many_tokens: ManyTokens | None = None,
) -> None:
    """Emit a layer for any number of tokens: code for one, and for each size of tile.

    Parameters
    ----------
    prepare : callable
        Emits what happens to the activations first; None is one token.
    row_sums : callable
    in_task : callable
        Emits what each task does first where there are several tokens; returns its inputs.
    one_token : callable or None
        Emits the outputs of one token; None: `row_sums` of a tile of one, row by row.
    many_tokens : ManyTokens or None
        What is used from a number of tokens on; None: tiles.
    """
    outputs = Outputs(spec, args.tokens, args.bias, args.residual, args.out)
    task_units = args.params["task_units"]
    rows = 2 if spec.epilogue.gated else 1

    def bounds(task: Expr) -> tuple[Expr, Expr]:
        start = B.bind(int64(load(task_units, task)))
        return start, B.bind(int64(load(task_units, task + int64(1))))

    def units(inputs: Inputs, task: Expr, token: Expr, tile: int) -> None:
        start, end = bounds(task)
        with B.serial(int64(0), end - start) as i:
            unit_sums(inputs, B.bind(start + i), token, tile)

    def unit_sums(inputs: Inputs, unit: Expr, token: Expr, tile: int) -> None:
        sums = local(rows * tile)
        with B.serial(int64(0), int64(rows)) as half:
            row = B.bind(unit * int64(rows) + half)
            row_sums(inputs, row, token, tile, sums, half * int64(tile))
        outputs.finish(sums, 0, unit, token, tile)

    def tasks(inputs: Inputs, tile: int, token: Expr, tiles: Expr) -> None:
        with each_task(config.tasks) as task:
            own = in_task(inputs)
            with B.serial(int64(0), tiles) as i:
                units(own, task, B.bind(token + i * int64(tile)), tile)

    def in_tiles() -> None:
        plan = TilePlan.of(args.tokens, config.tiles)
        inputs = prepare(plan)
        with B.If(plan.full > int64(0)), B.Then():
            tasks(inputs, plan.big, int64(0), plan.full)
        # Conditions are read from memory: TVM would try to prove every expression under them.
        chosen = local(1, "int64")
        store(chosen, plan.rest_size(), 0)
        for tile in plan.sizes[:-1]:
            with B.If(load(chosen, 0) == int64(tile)), B.Then():
                tasks(inputs, tile, plan.start, int64(1))

    with B.If(args.tokens == int64(1)):
        with B.Then():
            inputs = prepare(None)
            with each_task(config.tasks) as task:
                if one_token is None:
                    units(inputs, task, int64(0), 1)
                else:
                    one_token(inputs, outputs, *bounds(task))
        with B.Else():
            if many_tokens is None:
                in_tiles()
            else:
                with B.If(args.tokens < int64(many_tokens.least)):
                    with B.Then():
                        in_tiles()
                    with B.Else():
                        emit = many_tokens.prepare()
                        with each_task(config.tasks) as task:
                            emit(outputs, *bounds(task))
