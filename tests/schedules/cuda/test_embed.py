"""Machine code in place of source: the library's bytes, and a library that is linked of them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqsa_compiler._tvm import (
    finalize_host_passes,
    split_host_device_mods,
    tirx,
    tvm_ffi,
)
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.cuda.arch import ARCHES
from gqsa_compiler.schedules.cuda.embed import embed_machine_code
from gqsa_compiler.schedules.cuda.lowering import device_module, lower
from gqsa_compiler.schedules.cuda.nvcc import compile_cubin
from tests.schedules.cuda.cases import RULE, TARGET
from tests.schedules.cuda.test_nvcc import needs_nvcc
from tests.schedules.linear_cases import random_layer, spec_of

ARCH = ARCHES["sm_90"]


@pytest.fixture(scope="module")
def modules() -> tuple[Any, Any]:
    """Build a small layer's host module, which imports its CUDA module."""
    layer = random_layer(np.ones((4, 4), bool), 16, np.random.default_rng(0))
    spec = spec_of(layer, activation_dtype="int16")
    lowered = lower(RULE.build(spec, RULE.space(spec, TARGET)[0], TARGET), ARCH)
    packed = tirx.transform.MakePackedAPI()(lowered)
    host = finalize_host_passes()(split_host_device_mods(packed)[0])
    build = tvm_ffi.get_global_func("target.build.llvm")
    built = build(host, ARCH.target().host)
    device = device_module(lowered)
    built.import_module(device)
    return built, device


def blob_of(modules: tuple[Any, Any]) -> bytes:
    pack = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")
    return bytes(pack(modules[0]).numpy().tobytes())


def test_only_the_code_changes(modules: tuple[Any, Any]) -> None:
    blob, source = blob_of(modules), modules[1].inspect_source()
    assert source.encode() in blob
    code = b"\x7fELF machine code"
    new = embed_machine_code(blob, source, code, "cubin")
    assert int.from_bytes(new[:8], "little") == len(new) - 8
    assert len(blob) - len(new) == len(source.encode()) - len(code) - 1  # "cubin" is longer
    assert b"__global__" not in new
    assert new.endswith(len(code).to_bytes(8, "little") + code)
    # The table of functions stands before the code.
    place = blob.index(b"main_kernel")
    table = blob[place : blob.index(source.encode()) - 8]
    assert table in new


def test_other_bytes_are_refused(modules: tuple[Any, Any]) -> None:
    blob, source = blob_of(modules), modules[1].inspect_source()
    for wrong in (b"", blob[:-1], blob + b"\0", blob[:20], b"\x18" + b"\0" * 7 + b"\xff" * 24):
        with pytest.raises(CompileError, match="not laid out as in TVM"):
            embed_machine_code(wrong, source, b"code", "cubin")
    with pytest.raises(CompileError, match="0 CUDA modules"):
        embed_machine_code(blob, source + " ", b"code", "cubin")


@needs_nvcc
@pytest.mark.slow
def test_a_library_holds_machine_code_and_no_source(
    modules: tuple[Any, Any], tmp_path: Path
) -> None:
    source = modules[1].inspect_source()
    cubin, _ = compile_cubin(source, ARCH)
    blob = embed_machine_code(blob_of(modules), source, cubin, "cubin")
    make = tvm_ffi.get_global_func("codegen.codegen_blob")
    make(blob, False, '{"kind": "llvm"}', "").write_to_file(str(tmp_path / "blob.o"), "o")
    modules[0].write_to_file(str(tmp_path / "host.o"), "o")
    library = tmp_path / "kernel.so"
    objects = [str(tmp_path / name) for name in ("host.o", "blob.o")]
    subprocess.run(["g++", "-shared", "-o", str(library), *objects], check=True)
    data = library.read_bytes()
    assert cubin in data
    assert b"__global__" not in data
