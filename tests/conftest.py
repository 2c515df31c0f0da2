"""Shared by every test: what this machine has, and the texts that tests read."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Tiny models are all barriers to OpenMP: its threads should sleep there, not spin, or tests beside
# another busy process take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# TVM's own pool, on which tests run single kernels, would bind this process to one core for good.
os.environ.setdefault("TVM_BIND_THREADS", "0")


def _cuda_missing() -> str | None:
    """Return why GPU tests cannot run here, or None where they can."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver (libcuda.so.1) on this machine"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return "the CUDA driver does not start on this machine"
    return None if count.value else "no CUDA device on this machine"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu`, with the reason, where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _cuda_missing() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Let the programs that tests start be interrupted.

    A shell starts background jobs with SIGINT ignored, and children inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the repository's directory."""
    return ROOT


@pytest.fixture(scope="session")
def alice(root: Path) -> Path:
    """Return the path of a plain English text of 21 kB."""
    return root / "tests" / "data" / "alice.txt"


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """Return the path of WikiText-2's validation split, which is not part of the repository."""
    named = os.environ.get("GQSA_WIKITEXT")
    if not named or not Path(named).is_file():
        pytest.skip("set GQSA_WIKITEXT to WikiText-2's validation text to run this test")
    return Path(named)
