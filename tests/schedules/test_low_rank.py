"""The kernel of a low-rank path against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gqsa_compiler._tvm import Target, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes import cpu_code
from gqsa_compiler.schedules.low_rank.kernel import low_rank
from gqsa_compiler.schedules.low_rank.spec import LowRankSpec, Part
from gqsa_compiler.schedules.reference import activate
from gqsa_compiler.targets import parse_target

Array = npt.NDArray[Any]

QKV = LowRankSpec((Part(64, 0), Part(37, None), Part(40, 1)), 5)
CASES = {
    "folded": QKV,
    "one-float32": LowRankSpec((Part(576, 0),), 16, "float32"),
    "many-threads": LowRankSpec((Part(3000, 0), Part(72, 1)), 12),
    "activation": LowRankSpec((Part(50, 0),), 3, activation="relu"),
    "gated": LowRankSpec((Part(100, 0), Part(100, 1)), 4, activation="silu", gated=True),
    "up-only": LowRankSpec((Part(48, None), Part(48, 0)), 4, activation="gelu_tanh", gated=True),
    "gate-alone": LowRankSpec((Part(40, None), Part(40, None)), 0, activation="silu", gated=True),
}


def inputs(spec: LowRankSpec, tokens: int) -> list[Array]:
    """Make random arguments, without the output."""
    rng = np.random.default_rng(tokens)
    base = rng.standard_normal((tokens, spec.n)).astype(np.float32)
    if not spec.slots:
        return [base, base]
    u = rng.standard_normal((tokens, spec.slots * spec.rank)).astype(np.float32)
    return [base, u, rng.standard_normal((spec.rank, spec.n)).astype(spec.dtype)]


def expected(spec: LowRankSpec, base: Array, u: Array, b: Array | None = None) -> Array:
    """Compute it in float64."""
    total = base.astype(np.float64)
    for start, part in zip(spec.starts, spec.parts, strict=True):
        if part.slot is not None and b is not None:
            here = slice(start, start + part.features)
            own = u[:, part.slot * spec.rank :][:, : spec.rank].astype(np.float64)
            total[:, here] += own @ b[:, here].astype(np.float64)
    if spec.activation is None:
        return total
    if not spec.gated:
        return activate(spec.activation, total)
    gate, up = np.split(total, 2, axis=1)
    return activate(spec.activation, gate) * up


@pytest.mark.parametrize("case", CASES)
def test_it_agrees_with_numpy(case: str) -> None:
    spec, host = CASES[case], parse_target("cpu")
    kernel = low_rank(spec, host).with_attr("global_symbol", "main")
    function = tvm.compile(
        tvm.IRModule({"main": kernel}),
        target=Target(host.tvm_dict()),
        tir_pipeline=cpu_code.register(),
    )
    for tokens in (1, 2, 7, 300):
        arguments = inputs(spec, tokens)
        out = tvm.runtime.tensor(np.full((tokens, spec.n_out), np.nan, np.float32))
        function(*(tvm.runtime.tensor(a) for a in arguments), out)
        np.testing.assert_allclose(out.numpy(), expected(spec, *arguments), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LowRankSpec((Part(8, 1),), 4), r"rank 4 has the slots \[1\]"),
        (LowRankSpec((Part(8, None),), 4), r"rank 4 has the slots \[\]"),
        (LowRankSpec((Part(8, 0),), 0), r"rank 0 has the slots \[0\]"),
        (LowRankSpec((Part(8, None),), 0), "nothing to compute"),
        (LowRankSpec((Part(8, 0), Part(8, 1)), 4, gated=True), "two equal parts"),
        (LowRankSpec((Part(8, 0), Part(4, 1)), 4, "float16", "silu", True), "two equal parts"),
    ],
)
def test_what_means_nothing_is_refused(spec: LowRankSpec, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        low_rank(spec, parse_target("cpu"))
