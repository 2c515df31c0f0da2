"""Sparse linear layers on Arm's dot products with 8-bit activations.

Unlike the generic kernels', which have a scale for 8 columns, these have one a token, or for full
rows one a group: docs/arm.md says what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gqsa_compiler._tvm import B
from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.arm import address
from gqsa_compiler.schedules.arm import narrow_sparse_pack as layout
from gqsa_compiler.schedules.arm.dot import BYTE_FEATURE, COLUMNS, LANES
from gqsa_compiler.schedules.arm.narrow_inputs import SparseInputs, prepare_sparse
from gqsa_compiler.schedules.arm.narrow_sparse import SparseWeights, emit_block
from gqsa_compiler.schedules.arm.narrow_sparse_pack import SparseRecords
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.emit import Expr, int64, load
from gqsa_compiler.schedules.generic.epilogue import Outputs
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.generic.layout import units_of
from gqsa_compiler.schedules.generic.sharing import each_task
from gqsa_compiler.schedules.records.layout import output_block
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec
from gqsa_compiler.targets import TargetSpec

TILE = 4
"""Tokens computed at once where there are several."""


def multiplies_bytes(target: TargetSpec) -> bool:
    """Say whether a target has the kernels of 8-bit activations."""
    return target.arch == "aarch64" and BYTE_FEATURE in target.features


def narrow(spec: LinearSpec, target: TargetSpec) -> bool:
    """Say whether a layer's activations are bytes, in groups that fill vectors of them."""
    return (
        spec.weight == "bsr"
        and spec.activation_dtype == "int8"
        and multiplies_bytes(target)
        and spec.group_size % COLUMNS == 0
    )


def emit_blocks(spec: LinearSpec, config: GenericConfig, args: Arguments, of: Any) -> None:
    """Emit a layer for one token and for any number of them.

    Parameters
    ----------
    of : callable
        ``of(capacity)`` emits what happens to the activations of so many tokens first, and returns
        what emits a block: ``emit(outputs, start, number, token, tile)``.
    """
    outputs = Outputs(spec, args.tokens, args.bias, args.residual, args.out)
    task_units, block = args.params["task_units"], output_block(spec)

    def tasks(emit: Any, tiles: Expr, tile: int) -> None:
        with each_task(config.tasks) as task:
            start = B.bind(int64(load(task_units, task)))
            end = int64(load(task_units, task + int64(1)))
            count = B.bind(B.floordiv(end - start + int64(block - 1), int64(block)))
            with B.serial(int64(0), count) as number, B.serial(int64(0), tiles) as i:
                emit(outputs, start, number, B.bind(i * int64(tile)), tile)

    with B.If(args.tokens == int64(1)):
        with B.Then():
            tasks(of(int64(1)), int64(1), 1)
        with B.Else():
            tiles = B.bind(B.floordiv(args.tokens + int64(TILE - 1), int64(TILE)))
            tasks(of(B.bind(tiles * int64(TILE))), tiles, TILE)


class ArmNarrowInt4(ScheduleRule[GenericConfig]):
    """Sparse codes of 3 and 4 bits."""

    name: ClassVar[str] = "arm.narrow_int4"
    layout_version = 2

    def packed_by(self, config: GenericConfig) -> int:
        """Return the number of tasks: the rest is the same for every target."""
        return config.tasks

    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""
        return narrow(spec, target) and spec.bits in (3, 4)

    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[GenericConfig]:
        """List the configurations worth trying; the first is the default."""
        return (GenericConfig(max(1, min(64, units_of(spec))), LANES, (TILE,)),)

    def params(self, spec: LinearSpec, config: GenericConfig) -> tuple[ParamSpec, ...]:
        """Describe the packed tensors, in the order `build` takes them."""
        return layout.params(spec, config)

    def pack(
        self,
        spec: LinearSpec,
        config: GenericConfig,
        parts: Sequence[BSRLayer] | Sequence[npt.NDArray[Any]],
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Turn checkpoint layers into the tensors that `params` describes."""
        return layout.pack(spec, config, [part for part in parts if isinstance(part, BSRLayer)])

    def build(self, spec: LinearSpec, config: GenericConfig, target: TargetSpec) -> Any:
        """Return the scheduled PrimFunc; see `ScheduleRule.build` for its arguments."""

        def body(args: Arguments) -> None:
            weights = SparseWeights(
                spec,
                SparseRecords.of(spec),
                args.params["records"],
                args.params["row_starts"],
                args.params["factors"],
                args.params["zeros"],
                args.params["zero_factors"],
            )

            def of(capacity: Expr) -> Any:
                inverse = args.params["inverse_inputs"]
                inputs: SparseInputs = prepare_sparse(
                    spec, args.x, args.norm, inverse, args.tokens, capacity
                )

                def emit(
                    outputs: Outputs, start: Expr, number: Expr, token: Expr, tile: int
                ) -> None:
                    emit_block(weights, inputs, outputs, start, number, token, tile)

                return emit

            with address.helpers([]):
                emit_blocks(spec, config, args, of)

        return kernel(spec, self.params(spec, config), body)

    def stored(
        self, spec: LinearSpec, config: GenericConfig, part: BSRLayer
    ) -> npt.NDArray[np.float64]:
        """Decode a layer as its packed tensors have it, float64 [N, K]."""
        return layout.stored(spec, part)
