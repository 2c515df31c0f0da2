"""One build for the whole run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runtime.native.programs import Probe, Programs, build


@pytest.fixture(scope="session")
def programs() -> Programs:
    return build("release")


@pytest.fixture(scope="session")
def probe(programs: Programs) -> Iterator[Probe]:
    with Probe(programs.probe) as probe:
        yield probe


@pytest.fixture(scope="session")
def sanitized() -> Programs:
    """Return a build with AddressSanitizer and UndefinedBehaviorSanitizer."""
    return build("sanitized", "-DGQSA_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo")
