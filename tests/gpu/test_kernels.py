"""Kernels of `cuda.bsr_int4` on a GPU, at real shapes, against float64.

Needs a GPU, nvcc and TVM. Where there is no compiler, a bundle does the same checks
(docs/cuda-benchmarks.md).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gqsa_compiler.schedules.spec import Epilogue, LinearSpec

if TYPE_CHECKING:
    from cuda_driver import Driver

pytestmark = pytest.mark.gpu

TOKENS = (1, 2, 3, 4, 8, 9, 64, 65, 512)
FUSED: dict[str, dict[str, Any]] = {
    "gated": {"norm_eps": 1e-5, "epilogue": Epilogue(activation="silu", gated=True)},
    "bias_residual": {"epilogue": Epilogue(bias=True, residual=True)},
    "gelu": {"norm_eps": 1e-6, "epilogue": Epilogue(bias=True, activation="gelu_tanh")},
}


def check(
    device: Driver,
    arch: str,
    folder: Path,
    shape: str,
    dtype: str,
    *,
    sparsity: float = 0.5,
    tokens: tuple[int, ...] = TOKENS,
    every_configuration: bool = False,
    **fields: Any,
) -> None:
    """Build kernels, run them on a random layer, and compare all results with float64."""
    from cuda_bundle import RULE, Job, build, target_of
    from cuda_layers import prepare
    from cuda_measure import Case, run_cases
    from cuda_shapes import shapes_named

    (place,) = shapes_named([shape])
    spec = LinearSpec(place.n, place.k, "bsr", "int4", 16, activation_dtype=dtype)  # type: ignore[arg-type]
    spec = replace(spec, **fields)
    space = RULE.space(spec, target_of(arch))
    jobs = [
        Job(place, arch, "default" if config == space[0] else "sweep", spec, config, tokens, ())
        for config in (space if every_configuration else space[:1])
    ]
    manifest = build(folder / "bundle", jobs, [place], tokens, (sparsity,))
    kernels = {kernel["id"]: kernel for kernel in manifest["kernels"]}
    prepare(folder, manifest["kernels"], sparsity, max(tokens), 0)
    cases = [Case(name, sparsity, count) for name in kernels for count in tokens]
    found = list(run_cases(device, folder / "bundle", kernels, cases, folder, timed=False))
    results = [line for line in found if "case" in line]
    assert len(results) == len(cases)
    assert not [result for result in results if result["status"] != "ok"]


@pytest.mark.parametrize("dtype", ["int16", "float16"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("shape", ["4096x4096", "4096x11008", "11008x4096", "4096x14336"])
def test_a_layer_is_right(
    device: Driver, arch: str, tmp_path: Path, shape: str, sparsity: float, dtype: str
) -> None:
    check(device, arch, tmp_path, shape, dtype, sparsity=sparsity)


@pytest.mark.parametrize("dtype", ["int16", "float16"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_are_right(
    device: Driver, arch: str, tmp_path: Path, name: str, dtype: str
) -> None:
    check(device, arch, tmp_path, "6144x4096", dtype, **FUSED[name])


@pytest.mark.parametrize("dtype", ["int16", "float16"])
@pytest.mark.parametrize("size", [8, 32, 64, 128, 256])
def test_other_group_sizes_are_right(
    device: Driver, arch: str, tmp_path: Path, size: int, dtype: str
) -> None:
    check(device, arch, tmp_path, "4096x4096", dtype, group_size=size)


@pytest.mark.parametrize("dtype", ["int16", "float16"])
def test_every_configuration_is_right(
    device: Driver, arch: str, tmp_path: Path, dtype: str
) -> None:
    """The one-token code of the whole space."""
    check(device, arch, tmp_path, "4096x4096", dtype, tokens=(1,), every_configuration=True)


@pytest.mark.parametrize("dtype", ["int16", "float16"])
@pytest.mark.parametrize("shape", ["2x8192", "7x512", "151936x1024"])
def test_odd_shapes_are_right(
    device: Driver, arch: str, tmp_path: Path, shape: str, dtype: str
) -> None:
    """Rows cut between many blocks, fewer rows than a tile, and a head's."""
    check(device, arch, tmp_path, shape, dtype, tokens=(1, 8, 17))


def test_nearly_empty_layers_are_right(device: Driver, arch: str, tmp_path: Path) -> None:
    check(device, arch, tmp_path, "4096x4096", "float16", sparsity=0.995)
