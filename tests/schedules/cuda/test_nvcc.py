"""nvcc: finding it, reading what it says, and that every kernel builds for every architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.cuda import nvcc
from gqsa_compiler.schedules.cuda.arch import ARCHES
from gqsa_compiler.schedules.cuda.config import CudaConfig
from gqsa_compiler.schedules.cuda.lowering import device_source, lower
from gqsa_compiler.schedules.cuda.nvcc import KernelUse, compile_cubin, find_nvcc, parse_uses
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from tests.schedules.cuda.cases import RULE, cuda_target, rule_of

SPEC = LinearSpec(
    4096,
    4096,
    "bsr",
    "int4",
    16,
    4096 * 128,
    activation_dtype="float16",
    norm_eps=1e-5,
    epilogue=Epilogue(activation="silu", gated=True, residual=True),
)
PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'main_kernel_1' for 'sm_90'
ptxas info    : Function properties for main_kernel_1
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compiling entry function 'main_kernel' for 'sm_90'
ptxas info    : Function properties for main_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 58 registers, used 1 barriers
"""


def has_nvcc() -> bool:
    """Say whether this machine has nvcc."""
    try:
        find_nvcc()
    except CompileError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="nvcc is not installed")


def build(spec: LinearSpec, config: CudaConfig, arch: str) -> tuple[KernelUse, ...]:
    """Compile a layer's kernels for a GPU."""
    function = rule_of(spec).build(spec, config, cuda_target(arch))
    cubin, uses = compile_cubin(device_source(lower(function, ARCHES[arch])), ARCHES[arch])
    assert cubin.startswith(b"\x7fELF")
    return uses


def check_uses(uses: tuple[KernelUse, ...], config: CudaConfig) -> None:
    """Fail if a kernel spills, or the one for one token leaves no room for its blocks."""
    assert {use.name for use in uses} == {
        "main_kernel" + (f"_{i}" if i else "") for i in range(len(uses))
    }
    for use in uses:
        assert (use.stack_bytes, use.spill_bytes) == (0, 0), use
        if use.name == "main_kernel":
            allocated = -(-use.registers // 8) * 8
            assert allocated * config.threads * config.resident <= 65536, use


@needs_nvcc
def test_the_default_configuration_builds_without_spills() -> None:
    arch = "sm_90"
    config = RULE.space(SPEC, cuda_target(arch))[0]
    uses = build(SPEC, config, arch)
    assert len(uses) == 7
    check_uses(uses, config)


def _spec(dtype: str, group_size: int = 16, bits: int = 4) -> LinearSpec:
    fields = {
        "activation_dtype": dtype,
        "group_size": group_size,
        "weight_dtype": f"int{bits}",
        "nnz": 4096 * 2048 // group_size,
    }
    return LinearSpec(**{**SPEC.__dict__, **fields})


def _all() -> list[object]:
    """List every configuration of every architecture, a few seconds of nvcc each."""
    return [
        pytest.param(
            arch,
            dtype,
            config,
            id=f"{arch}-{dtype}-w{config.warps}r{config.resident}d{config.depth}s{config.scale_bits}",
        )
        for arch in ARCHES
        for dtype in ("float16", "int16")
        for config in RULE.space(_spec(dtype), cuda_target(arch))
    ]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype", "config"), _all())
def test_every_configuration_builds_without_spills(
    arch: str, dtype: str, config: CudaConfig
) -> None:
    check_uses(build(_spec(dtype), config, arch), config)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["float16", "int16"])
@pytest.mark.parametrize(
    ("group_size", "bits"),
    [(size, 4) for size in (8, 32, 64, 128, 256)]
    + [(size, bits) for bits in (2, 8) for size in (16, 64, 256)],
)
def test_other_groups_and_codes_build_without_spills(
    arch: str, dtype: str, group_size: int, bits: int
) -> None:
    spec = _spec(dtype, group_size, bits)
    config = rule_of(spec).space(spec, cuda_target(arch))[0]
    check_uses(build(spec, config, arch), config)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int16"])
@pytest.mark.parametrize("k", [14336, 18944, 28672])
def test_wide_layers_build_without_spills(dtype: str, k: int) -> None:
    """Each thread holds its share of a token's values: of many, small blocks hold too many."""
    spec = replace(_spec(dtype), n=4096, k=k, nnz=4096 * k // 32)
    configs = RULE.space(spec, cuda_target("sm_90"))
    assert len({(config.warps, config.depth) for config in configs}) >= 2
    for config in configs:
        uses = build(spec, config, "sm_90")
        # At 28672 inputs the code for two tokens spills; reading the weights once for each token
        # would cost far more.
        check_uses(uses if k < 28672 else uses[-1:], config)


def test_what_ptxas_says_is_read() -> None:
    assert parse_uses(PTXAS) == (
        KernelUse("main_kernel_1", 64, 8, 16),
        KernelUse("main_kernel", 58, 0, 0),
    )
    assert parse_uses("") == ()
    with pytest.raises(CompileError, match="ptxas says of kernel k what cannot be read"):
        parse_uses("Compiling entry function 'k' for 'sm_90'\nUsed many registers")


def test_nvcc_is_found_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.touch()
    monkeypatch.setattr(nvcc.shutil, "which", lambda _: None)
    monkeypatch.setattr(nvcc, "_package_folders", lambda: (tmp_path / "nvidia",))
    assert find_nvcc() == tool


def test_without_nvcc_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc.shutil, "which", lambda _: None)
    monkeypatch.setattr(nvcc, "_package_folders", lambda: ())
    with pytest.raises(CompileError, match=r"needs NVIDIA's compiler nvcc.*gqsa-compiler\[cuda\]"):
        find_nvcc()


@needs_nvcc
def test_what_nvcc_refuses_is_reported() -> None:
    with pytest.raises(CompileError, match=r"nvcc could not compile a kernel for sm_80: .*error"):
        compile_cubin("__global__ void k() { no; }", ARCHES["sm_80"])
