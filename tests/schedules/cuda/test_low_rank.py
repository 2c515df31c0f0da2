"""The kernel of a low-rank path on a GPU, under the emulation, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gqsa_compiler.schedules.cuda.arch import ARCHES
from gqsa_compiler.schedules.low_rank import cuda
from tests.schedules.cuda.emulation.run import emulate
from tests.schedules.test_low_rank import CASES, expected, inputs


@pytest.mark.parametrize(
    "case", ["gated", *(pytest.param(c, marks=pytest.mark.slow) for c in ("folded", "gate-alone"))]
)
def test_it_agrees_with_numpy(case: str, tmp_path: Path) -> None:
    spec = CASES[case]
    program = emulate(cuda.low_rank(spec), ARCHES["sm_80"], tmp_path)
    for tokens in (1, 5):
        arguments = inputs(spec, tokens)
        out = np.full((tokens, spec.n_out), np.nan, np.float32)
        found = program.run([*arguments, out])[-1]
        np.testing.assert_allclose(found, expected(spec, *arguments), rtol=1e-5, atol=1e-4)
