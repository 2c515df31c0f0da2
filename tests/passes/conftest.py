"""Every pass of every test here is followed by a well-formedness check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gqsa_compiler._tvm import relax, tvm


@tvm.ir.instrument.pass_instrument
class WellFormed:
    """Check the module after each pass."""

    def run_after_pass(self, mod: tvm.IRModule, info: Any) -> None:
        """Raise, naming the pass, when it broke the module."""
        try:
            relax.analysis.well_formed(mod)
        except Exception as error:
            raise AssertionError(f"pass {info.name} made an ill-formed module: {error}") from error


@pytest.fixture(autouse=True)
def _well_formed() -> Iterator[None]:
    with tvm.transform.PassContext(instruments=[WellFormed()]):
        yield
