"""Sparse linear layers on x86-64: 16-bit activations, integer dot products within a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.generic.config import has_native_half
from gqsa_compiler.schedules.generic.emit import Expr, vector_lanes
from gqsa_compiler.schedules.generic.epilogue import Outputs
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.generic.layout import units_of
from gqsa_compiler.schedules.generic.tasks import ManyTokens, emit_tasks
from gqsa_compiler.schedules.generic.tiles import TilePlan
from gqsa_compiler.schedules.records.layout import Records, pack
from gqsa_compiler.schedules.records.rule import RecordsRule
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec
from gqsa_compiler.schedules.x86 import bfloat16
from gqsa_compiler.schedules.x86.activations import Inputs, prepare
from gqsa_compiler.schedules.x86.config import X86Config, space
from gqsa_compiler.schedules.x86.dot import row_sums
from gqsa_compiler.schedules.x86.one_token import one_token
from gqsa_compiler.schedules.x86.scratch import Scratch
from gqsa_compiler.schedules.x86.weights import Weights
from gqsa_compiler.schedules.x86.wide import prepare_wide, row_block, wide
from gqsa_compiler.targets import TargetSpec


def has_bfloat16(target: TargetSpec) -> bool:
    """Say whether many tokens are multiplied as bfloat16."""
    return bfloat16.FEATURE in target.features


class X86Bsr(RecordsRule[X86Config]):
    """Those that need AVX2 at least."""

    layout_version = 3

    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""
        return self.reads(spec) and "avx2" in target.features

    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[X86Config]:
        """List the configurations worth trying; the first is the default."""
        return space(units_of(spec), vector_lanes(target), bfloat16=has_bfloat16(target))

    def params(self, spec: LinearSpec, config: X86Config) -> tuple[ParamSpec, ...]:
        """Describe the packed tensors, in the order `build` takes them."""
        return Records.of(spec).params(spec, config)

    def pack(
        self,
        spec: LinearSpec,
        config: X86Config,
        parts: Sequence[BSRLayer] | Sequence[npt.NDArray[Any]],
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Turn checkpoint layers into the tensors that `params` describes."""
        return pack(spec, config, [part for part in parts if isinstance(part, BSRLayer)])

    def build(self, spec: LinearSpec, config: X86Config, target: TargetSpec) -> Any:
        """Return the scheduled PrimFunc; see `ScheduleRule.build` for its arguments."""

        def body(args: Arguments) -> None:
            weights = Weights(
                spec,
                Records.of(spec),
                args.params["records"],
                args.params.get("factors"),
                args.params.get("row_starts"),
                2 * config.lanes,
                has_native_half(target),
                config.ahead,
            )

            def prepared(plan: TilePlan | None) -> Inputs:
                return prepare(spec, config, args.x, args.norm, args.tokens, plan, weights.overhang)

            def many() -> Callable[[Outputs, Expr, Expr], None]:
                inputs = prepare_wide(spec, config, args.x, args.norm, args.tokens)
                return partial(wide, weights, inputs, row_block(spec, config.wide_rows))

            def with_scratch(inputs: Inputs) -> Inputs:
                return replace(inputs, scratch=Scratch.allocate())

            with weights.helpers():
                emit_tasks(
                    spec,
                    config,
                    args,
                    prepared,
                    partial(row_sums, weights),
                    in_task=with_scratch,
                    one_token=partial(one_token, weights),
                    many_tokens=ManyTokens(config.wide_from, many)
                    if has_bfloat16(target)
                    else None,
                )

        def whole(args: Arguments) -> None:
            with bfloat16.helpers() if has_bfloat16(target) else nullcontext():
                body(args)

        return kernel(spec, self.params(spec, config), whole)


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
