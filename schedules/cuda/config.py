"""What the CUDA kernels can be tuned by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from gqsa_compiler.schedules.cuda.arch import WARP, Arch
from gqsa_compiler.schedules.cuda.layout import SLAB, StreamLayout
from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.schedules.spec import LinearSpec

TILES = (1, 2, 4, 8)
"""Token counts that the decode kernel has code for, where shared memory allows."""
BLOCK_ROWS = 512
"""Rows that a block of a launch may have a share of."""
MOST_WARPS = 16
"""Warps of a block that works on several tokens: their sums take up to 128 registers a thread."""
OTHER_REGISTERS = 16
"""What a thread needs beside the values of a token that it holds while it rounds them."""
_REGISTERS = 65536
LEAST_TILES = 4
"""Tiles of weights (512 bytes of codes) that are worth a block of their own."""


@dataclass(frozen=True)
class CudaConfig(KernelConfig):
    """Configuration of the sparse rules.

    Parameters
    ----------
    blocks : int
        Pieces of equal work that the weights are cut into when packing: the processors of the
        GPU, times the blocks that each holds at once.
    warps : int
        Warps of a block.
    resident : int
        Blocks that a processor must be able to hold of the code for one token, which bounds its
        registers.
    depth : int
        Tiles of weights that each warp has on their way from memory while it works.
    scale_bits : int
        16: scales as they are, relative to a power of two of the row. 8: three bits of exponent
        and five of mantissa, relative to the row's largest; off by 1.6 % at most, and 8 bits less
        a kept group. Not for codes of 8 bits, which are themselves off by less.
    """

    blocks: int
    warps: int = 16
    resident: int = 1
    depth: int = 2
    scale_bits: Literal[8, 16] = 16

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * WARP

    def for_tile(self, tile: int) -> CudaConfig:
        """Return the configuration of the code for a tile of tokens."""
        if tile == 1:
            return self
        return replace(self, warps=min(self.warps, MOST_WARPS), resident=1)


@dataclass(frozen=True)
class GemmTile:
    """Outputs that a block of the kernel for many tokens computes.

    Parameters
    ----------
    tokens, rows : int
        Of the block.
    warp_tokens, warp_rows : int
        Of a warp, multiples of 16 and 8.
    """

    tokens: int
    rows: int
    warp_tokens: int
    warp_rows: int

    @property
    def warps_across(self) -> int:
        """Warps side by side along the rows."""
        return self.rows // self.warp_rows

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.tokens // self.warp_tokens * self.warps_across * WARP

    @property
    def fragments(self) -> int:
        """Results of 16 tokens by 8 rows that a warp holds."""
        return self.warp_tokens // 16 * (self.warp_rows // 8)

    @property
    def stride(self) -> int:
        """Words from one token or row to the next in shared memory: four banks further on."""
        return SLAB // 2 + 4

    def shared_parts(self) -> dict[str, int]:
        """List what the kernel keeps in shared memory, in 4-byte words."""
        return {"tokens": self.tokens * self.stride, "weights": self.rows * self.stride}


FEW_TOKENS = GemmTile(64, 32, 16, 16)
"""For 9 to 64 tokens: as many blocks as the rows allow. 50 kB of shared memory."""
MANY_TOKENS = GemmTile(128, 64, 32, 32)
"""For more: 101376 bytes, all that a block has on a small GPU."""


@dataclass(frozen=True)
class DenseTile(GemmTile):
    """Outputs that a block of the dense kernel for many tokens computes.

    Parameters
    ----------
    step : int
        Columns that are fetched together.
    stages : int
        Steps that shared memory holds.
    terms : int
        Numbers that a token's value is the sum of.
    """

    step: int
    stages: int
    terms: int = 1

    @property
    def stride(self) -> int:
        """Words from one token or row to the next in shared memory: four banks further on."""
        return self.step // 2 + 4

    def shared_parts(self) -> dict[str, int]:
        """List what the kernel keeps in shared memory, in 4-byte words."""
        size = self.stages * self.stride
        return {"tokens": self.terms * self.tokens * size, "rows": self.rows * size}


FEW_DENSE = DenseTile(64, 32, 32, 16, step=64, stages=4)
"""For 9 to 64 tokens. 54 kB of shared memory, 90 kB with two terms."""
MANY_DENSE = DenseTile(128, 128, 64, 64, step=32, stages=3)
"""For more: 60 kB, or 90 kB. For a product, warps of 64 x 64 read a third less from shared memory
than those of 64 x 32, and that is what limits a GPU whose tensor cores are quick."""


def blocks_of(spec: LinearSpec, config: CudaConfig, units: int) -> int:
    """Return how many blocks a layer of so many units is cut into.

    Fewer than configured where it is small, and more where a block would have too many rows (a
    head with its vocabulary).
    """
    worth = max(1, units // (WARP * LEAST_TILES))
    for_rows = -(-2 * spec.n // BLOCK_ROWS)
    return max(for_rows, min(config.blocks, worth))


def shared_parts(spec: LinearSpec, config: CudaConfig, tile: int) -> dict[str, int]:
    """List what the decode kernel keeps in shared memory for a tile of tokens, in 4-byte words."""
    pieces = spec.k // StreamLayout.of(spec).piece
    return {
        "values": tile * spec.k // 2,  # first: its pieces are whole multiples of their size
        "sums": tile * (BLOCK_ROWS + config.warps),  # of rows, one a warp that has some of it
        "flags": 2,
        "value_sums": tile * pieces if spec.activation_dtype == "int16" else 0,
        "factors": tile,
        **measure_parts(tile, config.warps),
    }


def measure_parts(tile: int, warps: int) -> dict[str, int]:
    """List what finding a tile of tokens' scales takes, in 4-byte words."""
    return {"multipliers": tile, "partial": 2 * tile * warps}


def shared_bytes(spec: LinearSpec, config: CudaConfig, tile: int) -> int:
    """Return the shared memory of a block of the decode kernel; every part is 16-byte aligned."""
    return sum(-(-words // 4) * 16 for words in shared_parts(spec, config, tile).values())


def tiles_of(spec: LinearSpec, config: CudaConfig, arch: Arch) -> tuple[int, ...]:
    """Return the tiles of tokens that fit a block's shared memory, ascending; may be empty."""
    return tuple(t for t in TILES if shared_bytes(spec, config.for_tile(t), t) <= arch.shared_bytes)


def space(spec: LinearSpec, arch: Arch) -> tuple[CudaConfig, ...]:
    """List the configurations worth trying; the first is the default.

    A processor holds 1536 (compute capability 8.6, 8.9) or 2048 threads and 65536 registers: 32
    warps of 64 registers, or 24 of 80, which integers need with two tiles on their way, 20 of 96
    where a piece has more than 16 inputs, and 16 of 128 where it has 64. Small blocks whose threads
    would have to hold more values of a token than registers spill, and are left out.
    """
    bits: tuple[Literal[8, 16], ...] = (16,) if spec.bits == 8 else (16, 8)
    found = [
        CudaConfig(arch.processors * resident, warps, resident, depth, scale_bits)
        for scale_bits in bits
        for depth in (2, 1)
        for warps, resident in _shapes(spec, depth)
    ]
    fit = [config for config in found if _values_fit(spec, config)] or found[:1]
    return tuple(config for config in fit if tiles_of(spec, config, arch))


def _values_fit(spec: LinearSpec, config: CudaConfig) -> bool:
    registers = _REGISTERS // (config.threads * config.resident) // 8 * 8
    return spec.k <= (registers - OTHER_REGISTERS) * config.threads


def _shapes(spec: LinearSpec, depth: int) -> tuple[tuple[int, int], ...]:
    """List warps of a block and blocks of a processor."""
    if spec.activation_dtype == "int16" and depth == 2:
        chunks = StreamLayout.of(spec).chunks
        if chunks > 4:
            return (8, 2), (16, 1), (4, 4)
        if chunks > 2:
            return (10, 2), (20, 1), (5, 4)
        return (12, 2), (24, 1), (8, 3)
    return (16, 2), (32, 1), (8, 4)
