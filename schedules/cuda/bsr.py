"""Sparse linear layers of 2, 3, 4 and 8 bits on NVIDIA GPUs."""

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
from gqsa_compiler.schedules.cuda.arch import ARCHES, arch_for
from gqsa_compiler.schedules.cuda.config import CudaConfig, tiles_of
from gqsa_compiler.schedules.cuda.layout import COLUMN_BITS, StreamLayout
from gqsa_compiler.schedules.generic.emit import int64
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.reference import decode
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec
from gqsa_compiler.targets import TargetSpec


class CudaBsr(ScheduleRule[CudaConfig]):
    """Base of the rules, one for each size of a packed code.

    Activations are rounded to float16 (with a power of two a token) or to int16; sums are float32,
    after at most eight products in halves, or exact up to 64 products in integers.

    Attributes
    ----------
    code_bits : int
        Bits that a packed code takes.
    """

    layout_version: ClassVar[int] = 2
    code_bits: ClassVar[int]

    def code_key(self, spec: LinearSpec) -> LinearSpec:
        """Return what the code depends on: the bits only where the zero point follows from them.

        All extents that depend on the number of groups are symbolic, also where all are kept.
        """
        key = replace(spec, nnz=0)
        return key if spec.symmetric else replace(key, weight_dtype=f"int{self.code_bits}")

    def packed_by(self, config: CudaConfig) -> Hashable:
        """Return what of a configuration `pack` depends on."""
        return config.blocks, config.scale_bits

    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""
        if target.kind != "cuda" or target.arch not in ARCHES:
            return False
        return (
            spec.weight == "bsr"
            and StreamLayout.of(spec).code_bits == self.code_bits
            and spec.activation_dtype in ("float16", "int16")
            and spec.k // spec.group_size <= 1 << COLUMN_BITS
            and len(self.space(spec, target)) > 0
        )

    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[CudaConfig]:
        """List the configurations worth trying; the first is the default."""
        return configs.space(spec, arch_for(target))

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
        tiles = tiles_of(spec, config, arch_for(target))

        def body(args: Arguments) -> None:
            _dispatch(spec, config, args, tiles)

        return kernel(spec, self.params(spec, config), body)


class CudaBsrInt2(CudaBsr):
    """Codes of 2 bits, from G = 16 on."""

    name: ClassVar[str] = "cuda.bsr_int2"
    code_bits: ClassVar[int] = 2


class CudaBsrInt4(CudaBsr):
    """Codes of 4 bits; those of 3, and those of 2 in groups of 8, are widened when packing."""

    name: ClassVar[str] = "cuda.bsr_int4"
    code_bits: ClassVar[int] = 4


class CudaBsrInt8(CudaBsr):
    """Codes of 8 bits."""

    name: ClassVar[str] = "cuda.bsr_int8"
    code_bits: ClassVar[int] = 8


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
