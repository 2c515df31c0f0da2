"""Sparse linear layers on any LLVM target, for one token and for many, from one packed copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gqsa_compiler._tvm import B
from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.generic.bsr_dot import Weights, row_sums
from gqsa_compiler.schedules.generic.config import (
    GenericConfig,
    default_config,
    has_native_half,
)
from gqsa_compiler.schedules.generic.emit import Expr, int64, load, local
from gqsa_compiler.schedules.generic.epilogue import Outputs
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.generic.layout import BsrLayout, pack_bsr, units_of
from gqsa_compiler.schedules.generic.prologue import Inputs, prepare_one, prepare_tiles
from gqsa_compiler.schedules.generic.tiles import TilePlan
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec
from gqsa_compiler.targets import TargetSpec


class GenericBsr(ScheduleRule[GenericConfig]):
    """Sparse weights, float32 or int8 activations; tasks have equal numbers of groups.

    Attributes
    ----------
    bits : tuple of int
        Codes that it runs.
    """

    bits: ClassVar[tuple[int, ...]]

    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""
        return spec.weight == "bsr" and spec.bits in self.bits and target.kind == "llvm"

    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[GenericConfig]:
        """List the configurations worth trying; the first is the default."""
        return (default_config(units_of(spec), target),)

    def params(self, spec: LinearSpec, config: GenericConfig) -> tuple[ParamSpec, ...]:
        """Describe the packed tensors, in the order `build` takes them."""
        return BsrLayout.of(spec, config).params(spec, config)

    def pack(
        self,
        spec: LinearSpec,
        config: GenericConfig,
        parts: Sequence[BSRLayer] | Sequence[npt.NDArray[Any]],
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Turn checkpoint layers into the tensors that `params` describes."""
        layers = [part for part in parts if isinstance(part, BSRLayer)]
        return pack_bsr(spec, config, layers)

    def build(self, spec: LinearSpec, config: GenericConfig, target: TargetSpec) -> Any:
        """Return the scheduled PrimFunc; see `ScheduleRule.build` for its arguments."""

        def body(args: Arguments) -> None:
            weights = Weights(
                spec,
                BsrLayout.of(spec, config),
                has_native_half(target),
                args.params["codes"],
                args.params["scales"],
                args.params.get("meta"),
                args.params.get("row_starts"),
            )
            outputs = Outputs(spec, args.tokens, args.bias, args.residual, args.out)
            task_units = args.params["task_units"]

            def units(inputs: Inputs, task: Expr, token: Expr, tile: int) -> None:
                start = B.bind(int64(load(task_units, task)))
                end = B.bind(int64(load(task_units, task + int64(1))))
                with B.serial(int64(0), end - start) as i:
                    unit_sums(inputs, B.bind(start + i), token, tile)

            def unit_sums(inputs: Inputs, unit: Expr, token: Expr, tile: int) -> None:
                rows = 2 if spec.epilogue.gated else 1
                sums = local(rows * tile)
                with B.serial(int64(0), int64(rows)) as half:
                    row = B.bind(unit * int64(rows) + half)
                    row_sums(weights, inputs, row, token, tile, sums, half * int64(tile))
                outputs.finish(sums, 0, unit, token, tile)

            with B.If(args.tokens == int64(1)):
                with B.Then():
                    inputs = prepare_one(spec, args.x, args.norm, config.lanes)
                    with B.parallel(int64(0), int64(config.tasks)) as task:
                        units(inputs, task, int64(0), 1)
                with B.Else():
                    plan = TilePlan.of(args.tokens, config.tiles)
                    inputs = prepare_tiles(spec, args.x, args.norm, plan, args.tokens, config.lanes)
                    with B.parallel(int64(0), int64(config.tasks)) as task:
                        with B.serial(int64(0), plan.full) as i:
                            units(inputs, task, B.bind(i * int64(plan.big)), plan.big)
                        for below, tile in zip((0, *plan.sizes), plan.sizes[:-1], strict=False):
                            wanted = B.And(plan.rest > int64(below), plan.rest <= int64(tile))
                            with B.If(wanted), B.Then():
                                units(inputs, task, plan.start, tile)

        # `code_key` leaves the number of groups out, so their tensors have any length.
        full = BsrLayout.of(spec, config).full
        open_extents = frozenset() if full else frozenset({"codes", "scales", "meta"})
        return kernel(spec, self.params(spec, config), body, open_extents=open_extents)


class GenericBsrInt2(GenericBsr):
    """Codes of 2 bits."""

    name = "generic.bsr_int2"
    layout_version = 1
    bits = (2,)


class GenericBsrInt4(GenericBsr):
    """Codes of 4 bits; those of 3 are widened to 4 when packing."""

    name = "generic.bsr_int4"
    layout_version = 1
    bits = (3, 4)

    def code_key(self, spec: LinearSpec) -> LinearSpec:
        """Return what the code depends on: the bits only where the zero point follows from them."""
        key = super().code_key(spec)
        return key if spec.symmetric else replace(key, weight_dtype="int4")


class GenericBsrInt8(GenericBsr):
    """Codes of 8 bits."""

    name = "generic.bsr_int8"
    layout_version = 1
    bits = (8,)
