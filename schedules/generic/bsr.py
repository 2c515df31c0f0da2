"""Sparse linear layers on any LLVM target, for one token and for many, from one packed copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.generic.bsr_dot import Weights, row_sums
from gqsa_compiler.schedules.generic.config import (
    GenericConfig,
    configurations,
    has_native_half,
)
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.generic.layout import BsrLayout, pack_bsr, units_of
from gqsa_compiler.schedules.generic.prologue import Inputs, prepare_one, prepare_tiles
from gqsa_compiler.schedules.generic.tasks import emit_tasks
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
        return (
            spec.weight == "bsr"
            and spec.bits in self.bits
            and spec.activation_dtype in ("float32", "int8")
            and target.kind == "llvm"
        )

    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[GenericConfig]:
        """List the configurations worth trying; the first is the default."""
        return configurations(units_of(spec), target)

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

            def prepare(plan: TilePlan | None) -> Inputs:
                if plan is None:
                    return prepare_one(spec, args.x, args.norm, config.lanes)
                return prepare_tiles(spec, args.x, args.norm, plan, args.tokens, config.lanes)

            emit_tasks(spec, config, args, prepare, partial(row_sums, weights))

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
