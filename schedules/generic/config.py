"""What the generic kernels can be tuned by, and the defaults for a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gqsa_compiler.schedules.generic.emit import vector_lanes
from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.targets import TargetSpec


@dataclass(frozen=True)
class GenericConfig(KernelConfig):
    """Configuration of a generic kernel.

    Parameters
    ----------
    tasks : int
        Pieces of work, spread over the threads at run time: 64, or one an output where there are
        fewer. Fixed when packing, for a machine of any size; threads beyond it have nothing to do.
    lanes : int
        float32 lanes of a vector register: 4, 8 or 16. Part of the generic rules' packed layout.
    tiles : tuple of int
        Tokens computed at once, ascending powers of two; each decoded group of weights is used for
        as many tokens. One token has code of its own.
    """

    tasks: int = 64
    lanes: int = 16
    tiles: tuple[int, ...] = (4, 8, 16)


def default_config(units: int, target: TargetSpec) -> GenericConfig:
    """Choose a configuration for `units` independent outputs on `target`.

    A tile needs one register a token, so 16 tokens only where there are 32 wide registers.
    """
    tiles = (4, 8, 16) if target.vector_bits == 512 else (4, 8)
    return GenericConfig(tasks=max(1, min(64, units)), lanes=vector_lanes(target), tiles=tiles)


def task_counts(units: int) -> tuple[int, ...]:
    """List the numbers of tasks worth trying for `units` outputs; the first is the default."""
    return tuple(dict.fromkeys(max(1, min(count, units)) for count in (64, 16, 32, 128, 256)))


def configurations(units: int, target: TargetSpec) -> Sequence[GenericConfig]:
    """List the configurations worth trying for `units` outputs; the first is the default."""
    default = default_config(units, target)
    tiles = dict.fromkeys((default.tiles, (4, 8), (2, 4, 8), (8,), (4, 8, 16), (8, 16)))
    return [
        replace(default, tasks=tasks, tiles=sizes)
        for tasks in task_counts(units)
        for sizes in tiles
    ]


def has_native_half(target: TargetSpec) -> bool:
    """Say whether `target` converts float16 to float32 in one instruction."""
    return target.arch == "aarch64" or "f16c" in target.features
