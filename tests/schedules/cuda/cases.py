"""Runs of the CUDA rule under the emulation, for the kernel tests."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.cuda import config as configs
from gqsa_compiler.schedules.cuda.arch import arch_of
from gqsa_compiler.schedules.cuda.bsr import CudaBsr, CudaBsrInt2, CudaBsrInt4, CudaBsrInt8
from gqsa_compiler.schedules.cuda.config import CudaConfig
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.targets import TargetSpec
from tests.schedules.cuda.emulation.run import Program, emulate
from tests.schedules.linear_cases import assert_within, expected, random_operands

Array = npt.NDArray[Any]
RULE = CudaBsrInt4()
RULES = (CudaBsrInt2(), RULE, CudaBsrInt8())
HALF_ERROR = 1.5e-3
"""Of the sum of magnitudes: a half's inputs and sums of eight are off by 2^-11 each at most."""


def cuda_target(arch: str) -> TargetSpec:
    """Describe a GPU architecture as a target."""
    return TargetSpec(f"cuda:{arch}", "cuda", arch, "", (), "")


TARGET = cuda_target("sm_90")


def rule_of(spec: LinearSpec) -> CudaBsr:
    """Return the only rule that runs a layer."""
    (rule,) = (rule for rule in RULES if rule.applies(spec, TARGET))
    return rule


@lru_cache(maxsize=64)
def program(code: LinearSpec, config: CudaConfig, tiles: tuple[int, ...]) -> Program:
    """Compile a kernel for the emulation, with code for tiles of so many tokens only."""
    rule = rule_of(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "TILES", tiles)
        return emulate(rule.build(code, config, TARGET), arch_of(TARGET.arch))


def run(
    spec: LinearSpec,
    config: CudaConfig,
    layers: list[BSRLayer],
    x: Array,
    operands: dict[str, Array],
    tiles: tuple[int, ...],
    order: int = 0,
) -> Array:
    """Pack `layers`, run the emulated kernel, check its counters, and return its output."""
    rule = rule_of(spec)
    packed = rule.pack(spec, config, layers)
    names = [param.name for param in rule.params(spec, config)]
    for param in rule.params(spec, config):
        array = packed[param.name]
        assert str(array.dtype) == param.dtype, param.name
        assert param.shape in (array.shape, (None,)), param.name
    before = [x] + ([operands["norm"]] if "norm" in operands else [])
    after = [operands[name] for name in ("bias", "residual") if name in operands]
    out = np.full((len(x), spec.n_out), np.nan, np.float32)
    arrays = [*before, *(packed[name] for name in names), *after, out]
    results = program(rule.code_key(spec), config, tiles).run(arrays, order)
    written = {len(before) + names.index(name) for name in ("arrivals", "partials")}
    for i, (old, new) in enumerate(zip(arrays[:-1], results[:-1], strict=True)):
        if i not in written:
            np.testing.assert_array_equal(old, new)
    assert not results[len(before) + names.index("arrivals")].any(), "a counter was left behind"
    return results[-1]


def check(
    spec: LinearSpec,
    config: CudaConfig,
    layers: list[BSRLayer],
    m: int,
    rng: np.random.Generator,
    tiles: tuple[int, ...],
    order: int = 0,
) -> Array:
    """Run random inputs, compare the output with the reference, and return it."""
    x = rng.standard_normal((m, spec.k)).astype(np.float32)
    operands = random_operands(spec, m, rng)
    weight = np.concatenate([rule_of(spec).stored(spec, config, layer) for layer in layers])
    # A code and its zero point are up to 15 (or 255) times the scale.
    magnitude = (20 if spec.bits < 8 else 60) * np.abs(weight)
    if spec.activation_dtype == "float16":
        magnitude = HALF_ERROR / 2e-6 * np.abs(weight)
    got = run(spec, config, layers, x, operands, tiles, order)
    assert_within(got, expected(spec, weight, magnitude, x, operands))
    return got
