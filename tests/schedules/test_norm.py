"""RMSNorm and LayerNorm kernels against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from gqsa_compiler._tvm import Target, tvm
from gqsa_compiler.schedules.generic.norm import norm
from gqsa_compiler.targets import parse_target


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("features", [576, 100, 37])
def test_norms_agree_with_numpy(features: int, center: bool) -> None:
    kernel = norm(features, 1e-5, center=center).with_attr("global_symbol", "main")
    target = Target(parse_target("cpu").tvm_dict())
    function = tvm.compile(tvm.IRModule({"main": kernel}), target=target)
    rng = np.random.default_rng(features)
    for tokens in (1, 3, 40):
        # A mean far from 0 shows a variance computed as a difference of large numbers.
        x = (rng.standard_normal((tokens, features)) + 30).astype(np.float32)
        weight, bias = rng.standard_normal((2, features)).astype(np.float32)
        arguments = [x, weight, bias] if center else [x, weight]
        out = tvm.runtime.tensor(np.zeros((tokens, features), np.float32))
        function(*(tvm.runtime.tensor(a) for a in arguments), out)
        exact = x.astype(np.float64)
        value = exact - exact.mean(-1, keepdims=True) if center else exact
        expected = value / np.sqrt((value**2).mean(-1, keepdims=True) + 1e-5) * weight
        np.testing.assert_allclose(out.numpy(), expected + (bias if center else 0), atol=2e-5)
