"""NVIDIA's GPUs by name, in TVM's spelling, where there are kernels for their architecture."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

PREFIX = "nvidia/"

_BY_ARCH: Mapping[str, str] = {
    "sm_80": "nvidia-a100 nvidia-a30",
    "sm_86": """
        geforce-rtx-3050 geforce-rtx-3060 geforce-rtx-3060-ti geforce-rtx-3070 geforce-rtx-3070-ti
        geforce-rtx-3080 geforce-rtx-3080-ti geforce-rtx-3090 geforce-rtx-3090-ti
        nvidia-a10 nvidia-a10g nvidia-a16 nvidia-a2 nvidia-a40
        rtx-a2000 rtx-a4000 rtx-a5000 rtx-a6000
    """,
    "sm_89": """
        geforce-rtx-4050 geforce-rtx-4060 geforce-rtx-4060-ti geforce-rtx-4070 geforce-rtx-4070-ti
        geforce-rtx-4080 geforce-rtx-4090 nvidia-l4 nvidia-l40 nvidia-l40s rtx-6000-ada
    """,
    "sm_90": "nvidia-gh200 nvidia-h100 nvidia-h200",
}
"""NVIDIA, "CUDA GPU Compute Capability"; names as TVM's tags have them, or as they would."""

GPU_ARCHES: Mapping[str, str] = {
    PREFIX + name: arch for arch, names in _BY_ARCH.items() for name in names.split()
}
"""A GPU's name to its architecture, as nvcc says it."""


def near_names(name: str) -> tuple[str, ...]:
    """List the known names that a wrong one may stand for, the nearest first."""
    return tuple(difflib.get_close_matches(name.lower(), GPU_ARCHES, n=3, cutoff=0.6))


__all__ = ["GPU_ARCHES", "PREFIX", "near_names"]
