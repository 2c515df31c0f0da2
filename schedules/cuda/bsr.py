"""Sparse INT4 linear layers on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gqsa_compiler._tvm import B
from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.cuda import config as configs
from gqsa_compiler.schedules.cuda import gemm, gemv, pack
from gqsa_compiler.schedules.cuda.arch import ARCHES, arch_of
from gqsa_compiler.schedules.cuda.config import CudaConfig, tiles_of
from gqsa_compiler.schedules.cuda.layout import COLUMN_BITS
from gqsa_compiler.schedules.generic.emit import int64
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.reference import decode
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec
from gqsa_compiler.targets import TargetSpec


class CudaBsrInt4(ScheduleRule[CudaConfig]):
    """Codes of 4 bits; those of 2 and 3 are widened to 4 when packing.

    Activations are rounded to float16 (with a power of two a token) or to int16; sums are float32,
    after at most eight products in halves, or exact up to 32 products in integers.
    """

    name: ClassVar[str] = "cuda.bsr_int4"
    layout_version: ClassVar[int] = 1

    def code_key(self, spec: LinearSpec) -> LinearSpec:
        """Return what the code depends on: the bits only where the zero point follows from them.

        All extents that depend on the number of groups are symbolic, also where all are kept.
        """
        key = replace(spec, nnz=0)
        return key if spec.symmetric else replace(key, weight_dtype="int4")

    def packed_by(self, config: CudaConfig) -> Hashable:
        """Return what of a configuration `pack` depends on."""
        return config.blocks, config.scale_bits

    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""
        if target.kind != "cuda" or target.arch not in ARCHES:
            return False
        return (
            spec.weight == "bsr"
            and spec.bits in (2, 3, 4)
            and spec.activation_dtype in ("float16", "int16")
            and spec.k // spec.group_size <= 1 << COLUMN_BITS
            and len(self.space(spec, target)) > 0
        )

    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[CudaConfig]:
        """List the configurations worth trying; the first is the default."""
        return configs.space(spec, arch_of(target.arch))

    def params(self, spec: LinearSpec, config: CudaConfig) -> tuple[ParamSpec, ...]:
        """Describe the packed tensors, in the order `build` takes them."""
        return pack.params(spec, config)

    def pack(
        self,
        spec: LinearSpec,
        config: CudaConfig,
        parts: Sequence[BSRLayer] | Sequence[npt.NDArray[Any]],
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Turn checkpoint layers into the tensors that `params` describes."""
        layers = [part for part in parts if isinstance(part, BSRLayer)]
        return pack.pack(spec, config, layers)

    def stored(
        self, spec: LinearSpec, config: CudaConfig, part: BSRLayer
    ) -> npt.NDArray[np.float64]:
        """Decode a layer as its packed tensors have it, float64 [N, K]."""
        return decode(replace(part, scales=pack.stored_scales(config, part)))

    def build(self, spec: LinearSpec, config: CudaConfig, target: TargetSpec) -> Any:
        """Return the scheduled PrimFunc; see `ScheduleRule.build` for its arguments.

        It launches one kernel for up to 1, 2, 4 or 8 tokens, as far as they fit shared memory. For
        more tokens it launches the tensor cores' kernel, or with int16 activations, which these do
        not have, the largest of the others again and again.
        """
        tiles = tiles_of(spec, config, arch_of(target.arch))

        def body(args: Arguments) -> None:
            _dispatch(spec, config, args, tiles)

        return kernel(spec, self.params(spec, config), body)


def _dispatch(
    spec: LinearSpec, config: CudaConfig, args: Arguments, tiles: tuple[int, ...]
) -> None:
    """Emit the choice of the smallest tile that holds all tokens."""
    if not tiles:
        x = gemm.Halves.emit(spec, config, args)
        with B.If(args.tokens <= int64(configs.FEW_TOKENS.tokens)):
            with B.Then():
                gemm.launch(spec, config, args, configs.FEW_TOKENS, x)
            with B.Else():
                gemm.launch(spec, config, args, configs.MANY_TOKENS, x)
        return
    if len(tiles) == 1 and spec.activation_dtype == "int16":
        tile = tiles[0]
        with B.serial(int64(0), B.floordiv(args.tokens + int64(tile - 1), int64(tile))) as i:
            gemv.launch(spec, config, args, tile, B.bind(i * int64(tile)))
        return
    with B.If(args.tokens <= int64(tiles[0])):
        with B.Then():
            gemv.launch(spec, config, args, tiles[0], int64(0))
        with B.Else():
            _dispatch(spec, config, args, tiles[1:])
