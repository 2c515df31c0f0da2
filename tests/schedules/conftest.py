"""Settings of all kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gqsa_compiler.schedules.generic import emit


@pytest.fixture(scope="session", autouse=True)
def _threads_for_little_work() -> Iterator[None]:
    """Build kernels that wake the threads early, so that small inputs reach both branches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emit, "THREAD_FLOATS", 1000)
        yield
