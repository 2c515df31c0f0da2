"""Sparse linear layers on x86-64: 16-bit activations, integer dot products within a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.generic.config import GenericConfig, has_native_half
from gqsa_compiler.schedules.generic.emit import vector_lanes
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.generic.layout import BsrLayout, units_of
from gqsa_compiler.schedules.generic.tasks import emit_tasks
from gqsa_compiler.schedules.generic.tiles import TilePlan
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec
from gqsa_compiler.schedules.x86.activations import Inputs, prepare
from gqsa_compiler.schedules.x86.dot import row_sums
from gqsa_compiler.schedules.x86.layout import Chunks, pack
from gqsa_compiler.schedules.x86.scratch import Scratch
from gqsa_compiler.schedules.x86.weights import Weights
from gqsa_compiler.targets import TargetSpec


class X86Bsr(ScheduleRule[GenericConfig]):
    """Sparse weights, 16-bit activations; tasks have equal numbers of groups.

    Attributes
    ----------
    bits : tuple of int
        Codes that it runs.
    """

    layout_version = 2
    bits: ClassVar[tuple[int, ...]]

    def packed_by(self, config: GenericConfig) -> int:
        """Return the number of tasks: the rest is the same for every target."""
        return config.tasks

    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""
        return spec.weight == "bsr" and spec.bits in self.bits and spec.activation_dtype == "int16"

    def code_key(self, spec: LinearSpec) -> LinearSpec:
        """Return what the code depends on: the bits only where the zero point follows from them."""
        key = super().code_key(spec)
        return key if spec.symmetric else replace(key, weight_dtype=f"int{self.bits[-1]}")

    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[GenericConfig]:
        """List the configurations worth trying; the first is the default."""
        lanes = vector_lanes(target)
        # Few tokens one after the other, many side by side in the lanes of one or two vectors: four
        # read more activations at once than the second-level cache keeps, and are slower.
        tiles = (4, lanes, 2 * lanes)
        return (GenericConfig(max(1, min(64, units_of(spec))), lanes, tiles),)

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
        return pack(spec, config, [part for part in parts if isinstance(part, BSRLayer)])

    def build(self, spec: LinearSpec, config: GenericConfig, target: TargetSpec) -> Any:
        """Return the scheduled PrimFunc; see `ScheduleRule.build` for its arguments."""
        layout, chunks = BsrLayout.of(spec, config), Chunks.of(spec, config)

        def body(args: Arguments) -> None:
            weights = Weights(
                spec,
                layout,
                chunks,
                2 * config.lanes,
                has_native_half(target),
                args.params["codes"],
                args.params["scales"],
                args.params.get("meta"),
                args.params.get("row_starts"),
            )
            # A row of a layer with all groups may begin in the middle of a unit.
            slack = 0 if weights.aligned else chunks.groups * chunks.group_size

            def prepared(plan: TilePlan | None) -> Inputs:
                return prepare(spec, config, args.x, args.norm, args.tokens, plan, slack)

            def with_scratch(inputs: Inputs) -> Inputs:
                return replace(inputs, scratch=Scratch.allocate())

            emit_tasks(
                spec, config, args, prepared, partial(row_sums, weights), in_task=with_scratch
            )

        # `code_key` leaves the number of groups out, so their tensors have any length.
        open_extents = frozenset() if layout.full else frozenset({"codes", "scales", "meta"})
        return kernel(spec, self.params(spec, config), body, open_extents=open_extents)


class X86BsrInt2(X86Bsr):
    """Codes of 2 bits."""

    name = "x86.bsr_int2"
    bits = (2,)


class X86BsrInt4(X86Bsr):
    """Codes of 4 bits; those of 3 are widened to 4 when packing."""

    name = "x86.bsr_int4"
    bits = (3, 4)


class X86BsrInt8(X86Bsr):
    """Codes of 8 bits."""

    name = "x86.bsr_int8"
    bits = (8,)
