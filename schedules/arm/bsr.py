"""Sparse linear layers on 64-bit Arm: 16-bit activations, integer dot products within a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.arm import address, bfloat16
from gqsa_compiler.schedules.arm import pack as layout
from gqsa_compiler.schedules.arm.activations import Inputs, prepare
from gqsa_compiler.schedules.arm.dot import BYTE_FEATURE, LANES
from gqsa_compiler.schedules.arm.rows import one_token, row_sums
from gqsa_compiler.schedules.arm.scratch import Scratch
from gqsa_compiler.schedules.arm.weights import Weights
from gqsa_compiler.schedules.arm.wide import LEAST, ROWS, prepare_wide, wide
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.emit import Expr
from gqsa_compiler.schedules.generic.epilogue import Outputs
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.generic.layout import units_of
from gqsa_compiler.schedules.generic.tasks import ManyTokens, emit_tasks
from gqsa_compiler.schedules.generic.tiles import TilePlan
from gqsa_compiler.schedules.records.layout import Records
from gqsa_compiler.schedules.records.rule import RecordsRule
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec
from gqsa_compiler.targets import TargetSpec

TILES = (4, 8, 16)
"""Tokens computed at once: the lanes of one, two or four vectors."""


def as_bytes(spec: LinearSpec, target: TargetSpec) -> bool:
    """Say whether activations are multiplied as bytes: codes less their zero points must be too."""
    return BYTE_FEATURE in target.features and (spec.bits < 8 or spec.symmetric)


def has_matrices(spec: LinearSpec, target: TargetSpec) -> bool:
    """Say whether many tokens are multiplied as bfloat16."""
    return bfloat16.FEATURE in target.features and spec.n >= ROWS


class ArmBsr(RecordsRule[GenericConfig]):
    """Those for 64-bit Arm, with a constant a row beside the records."""

    layout_version = 1

    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""
        return self.reads(spec) and target.arch == "aarch64"

    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[GenericConfig]:
        """List the configurations worth trying; the first is the default."""
        return (GenericConfig(max(1, min(64, units_of(spec))), LANES, TILES),)

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
        in_bytes, matrices = as_bytes(spec, target), has_matrices(spec, target)

        def weights_of(args: Arguments) -> Weights:
            return Weights(
                spec,
                Records.of(spec),
                args.params["records"],
                args.params.get("factors"),
                args.params.get("row_starts"),
                in_bytes,
                args.params["constants"],
            )

        def body(args: Arguments, weights: Weights) -> None:
            def prepared(plan: TilePlan | None) -> Inputs:
                slack = weights.overhang
                return prepare(spec, args.x, args.norm, args.tokens, plan, slack, as_bytes=in_bytes)

            def with_scratch(inputs: Inputs) -> Inputs:
                return replace(inputs, scratch=Scratch.allocate(weights))

            emit_tasks(
                spec,
                config,
                args,
                prepared,
                partial(row_sums, weights),
                in_task=with_scratch,
                one_token=partial(one_token, weights),
                many_tokens=ManyTokens(LEAST, partial(many, args, weights)) if matrices else None,
            )

        def many(args: Arguments, weights: Weights) -> Callable[[Outputs, Expr, Expr], None]:
            inputs = prepare_wide(spec, args.x, args.norm, args.tokens)
            return partial(wide, weights, inputs)

        def whole(args: Arguments) -> None:
            weights = weights_of(args)
            with ExitStack() as known:
                if in_bytes:
                    known.enter_context(address.helpers(weights.step_shifts()))
                if matrices:
                    known.enter_context(bfloat16.helpers())
                body(args, weights)

        return kernel(spec, self.params(spec, config), whole)


class ArmBsrInt2(ArmBsr):
    """Codes of 2 bits."""

    name = "arm.bsr_int2"
    bits = (2,)


class ArmBsrInt4(ArmBsr):
    """Codes of 4 bits; those of 3 are widened to 4 when packing."""

    name = "arm.bsr_int4"
    bits = (3, 4)


class ArmBsrInt8(ArmBsr):
    """Codes of 8 bits."""

    name = "arm.bsr_int8"
    bits = (8,)
