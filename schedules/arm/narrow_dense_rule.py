"""Layers that keep all groups, the head among them, with 8-bit activations on Arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.arm import address
from gqsa_compiler.schedules.arm import narrow_dense_pack as layout
from gqsa_compiler.schedules.arm.dot import LANES
from gqsa_compiler.schedules.arm.narrow_bsr import TILE, emit_blocks, narrow
from gqsa_compiler.schedules.arm.narrow_dense import DenseWeights, emit_block
from gqsa_compiler.schedules.arm.narrow_inputs import prepare_dense
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.emit import Expr
from gqsa_compiler.schedules.generic.epilogue import Outputs
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.generic.layout import units_of
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec
from gqsa_compiler.targets import TargetSpec


class ArmNarrowDense(ScheduleRule[GenericConfig]):
    """Full rows in blocks of eight outputs; a scale for every group of activations.

    Attributes
    ----------
    bits : tuple of int
        Codes that it runs.
    """

    layout_version = 1
    bits: ClassVar[tuple[int, ...]]

    def packed_by(self, config: GenericConfig) -> int:
        """Return the number of tasks: the rest is the same for every target."""
        return config.tasks

    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""
        full = spec.nnz == spec.n * (spec.k // spec.group_size) if spec.group_size else False
        return (
            narrow(spec, target)
            and full
            and spec.bits in self.bits
            and (spec.bits < 8 or spec.symmetric)
            and spec.n_out >= layout.LANES
        )

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
            weights = DenseWeights(
                spec,
                layout.DenseRecords.of(spec),
                args.params["records"],
                args.params["factors"],
            )

            def of(capacity: Expr) -> Any:
                inputs = prepare_dense(spec, args.x, args.norm, args.tokens, capacity)

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


class ArmNarrowDense4(ArmNarrowDense):
    """Codes of 3 and 4 bits."""

    name = "arm.narrow_dense_int4"
    bits = (3, 4)


class ArmNarrowDense8(ArmNarrowDense):
    """Symmetric codes of 8 bits."""

    name = "arm.narrow_dense_int8"
    bits = (8,)
