"""The Arm cores that are known by name: what they can do, and how large their caches are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ArmCore:
    """A 64-bit Arm core.

    Parameters
    ----------
    features : frozenset of str
        LLVM's names of the features that the kernels use.
    l1_kib, l2_kib : int
        The first-level data cache, and the second level's share of one core, in KiB; where the
        licensee chooses, the smallest choice that is common (docs/arm.md has the sources).
    model : str
        Which of LLVM's scheduling models stands for it; LLVM's name of the core.
    found_in : str
        Where one meets it.
    """

    features: frozenset[str]
    l1_kib: int
    l2_kib: int
    model: str
    found_in: str


_PLAIN = frozenset({"neon"})
_DOT = _PLAIN | {"dotprod"}
_MATRIX = _DOT | {"i8mm", "bf16"}

ARM_CORES: Mapping[str, ArmCore] = {
    "cortex-a72": ArmCore(_PLAIN, 32, 256, "cortex-a72", "Raspberry Pi 4"),
    "cortex-a76": ArmCore(_DOT, 64, 128, "cortex-a76", "phones of 2019, Raspberry Pi 5"),
    "cortex-a78": ArmCore(_DOT, 32, 256, "cortex-a78", "phones of 2021, Jetson Orin"),
    "cortex-x1": ArmCore(_DOT, 64, 512, "cortex-x1", "phones of 2021"),
    "neoverse-n1": ArmCore(_DOT, 64, 1024, "neoverse-n1", "Graviton 2, Ampere Altra"),
    "neoverse-v1": ArmCore(_MATRIX, 64, 1024, "neoverse-v1", "Graviton 3"),
    "neoverse-v2": ArmCore(_MATRIX, 64, 1024, "neoverse-v2", "Graviton 4, Grace"),
    "apple-m1": ArmCore(_DOT, 128, 3072, "apple-m1", "Macs of 2020, iPhone 12 (A14)"),
    "apple-m2": ArmCore(_MATRIX, 128, 4096, "apple-m2", "Macs of 2022, iPhone 13 (A15)"),
}
"""The cores, by the names that stand behind ``aarch64:`` in a TARGET."""
