"""The GPU of this machine, and the benchmarks' modules, by which kernels run on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

if TYPE_CHECKING:
    from cuda_driver import Driver


@pytest.fixture(scope="session")
def device() -> Driver:
    """Return the first GPU."""
    from cuda_driver import Driver

    return Driver()


@pytest.fixture(scope="session")
def arch(device: Driver) -> str:
    """Return the architecture that kernels are built for here; skips GPUs that have none."""
    from gqsa_compiler.schedules.cuda.arch import ARCHES

    found = str(device.info()["arch"])
    if found not in ARCHES:
        pytest.skip(f"there are no kernels for {found}")
    return found
