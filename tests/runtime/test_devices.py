"""Memory of a device: copies, and the sum that the cache is sized by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqsa_compiler.runtime import devices
from gqsa_compiler.runtime._ffi import tvm_ffi
from gqsa_compiler.runtime.devices import Device, fit_cache, out_of_memory
from gqsa_compiler.runtime.engine import Session
from gqsa_compiler.runtime.errors import ArtefactError, UsageError
from gqsa_compiler.runtime.gpus import CPU, CUDA
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.model import Model
from gqsa_compiler.runtime.program import Program

MB = 1 << 20


def manifest_of(made: Manifest) -> Manifest:
    """Give a manifest round numbers: 64 kB a token in pages of 16, 100 MB of workspace."""
    return replace(
        made,
        kv_cache=replace(made.kv_cache, page_size=16, bytes_per_token=1 << 16),
        memory=replace(made.memory, workspace_bytes=100 * MB, weights_bytes=1000 * MB),
    )


def test_the_cpu_shares_its_memory() -> None:
    cpu = Device()
    assert cpu.is_cpu
    assert cpu.vm_arguments == (1, 0, 2)
    assert cpu.free_bytes() is None
    tensor = tvm_ffi.from_dlpack(np.arange(5, dtype=np.float32))
    assert cpu.upload(tensor) is tensor
    assert cpu.download(tensor).ctypes.data == tensor.data_ptr()


def test_a_gpu_gets_copies(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    """With the CPU's memory in the GPU's place."""
    gpu = Device(CUDA, 0)
    assert gpu.vm_arguments == (2, 0, 2, 1, 0, 2)
    monkeypatch.setitem(devices._NAMES, CUDA, "cpu")
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    there = gpu.upload(tvm_ffi.from_dlpack(array))
    assert there.data_ptr() != array.ctypes.data
    back = gpu.download(there)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, array)


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = tvm_ffi.from_dlpack(np.zeros(4, np.float32))
    for words, kind in (("CUDA: out of memory", ArtefactError), ("driver gone", RuntimeError)):

        def fail(*_: Any, words: str = words) -> None:
            raise RuntimeError(words)

        monkeypatch.setattr(devices, "_call", fail)
        with pytest.raises(kind, match=r"GPU 0 is out of memory|driver gone"):
            Device(CUDA).upload(tensor)
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("bad shape"))


def test_the_cache_is_fitted_into_free_memory(model: Model) -> None:
    manifest = manifest_of(model.manifest)
    reserve = 100 * MB + 384 * MB
    room = 4 * 1024 * (1 << 16)  # of four sequences of 1024 tokens
    all_of_it = fit_cache(manifest, reserve + room, 4, 1024, fewer=False, shorter=False)
    assert (all_of_it.tokens, all_of_it.cache, all_of_it.sequences) == (4096, room, 4)
    assert "4096 tokens (4 x 1024)" in all_of_it.text()
    assert "weights 1.05 GB" in all_of_it.text()
    fewer = fit_cache(manifest, reserve + room - 1, 4, 1024, fewer=True, shorter=True)
    assert (fewer.sequences, fewer.context, fewer.tokens) == (3, 1024, 3072)
    shorter = fit_cache(manifest, reserve + 100 * (1 << 16), 4, 1024, fewer=True, shorter=True)
    assert (shorter.sequences, shorter.context) == (1, 96)  # whole pages
    one = fit_cache(manifest, reserve + (1 << 26), 2, 1024, fewer=False, shorter=True)
    assert (one.sequences, one.context, one.tokens) == (2, 512, 1024)
    with pytest.raises(UsageError, match=r"4096 tokens .* do not fit .*; 4080 tokens would"):
        fit_cache(manifest, reserve + room - 1, 4, 1024, fewer=False, shorter=False)
    with pytest.raises(UsageError, match=r"; 0 tokens would"):
        fit_cache(manifest, 1, 4, 1024, fewer=True, shorter=True)
    assert CPU == 1


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, artefact: Path) -> Program:
    """Return the toy with its parameters on what is taken for a GPU: the CPU again."""
    monkeypatch.setitem(devices._NAMES, CUDA, "cpu")
    monkeypatch.setattr(Device, "vm_arguments", property(lambda _: (CPU, 0, 2)))
    monkeypatch.setattr(Device, "free_bytes", lambda _: 1 << 30)
    program = Program(artefact, Manifest.read(artefact))
    program.device = Device(CUDA)
    program.parameters = tvm_ffi.Array([program.device.upload(p) for p in program.parameters])
    return program


def test_the_rate_of_copies(on_gpu: Program) -> None:
    assert on_gpu.device.copy_bandwidth(1 << 16, repeats=2) > 0


def test_a_session_copies_what_goes_in_and_comes_out(on_gpu: Program, model: Model) -> None:
    tokens = np.array([5, 9, 33, 7, 60, 2, 11, 80, 4], np.int32)
    session, own = Session(on_gpu), Session(model._program)
    try:
        assert session.memory is not None
        assert session.memory.sequences == session.max_batch
        for other in (session, own):
            other.add()
        np.testing.assert_array_equal(session.prefill(0, tokens), own.prefill(0, tokens))
        np.testing.assert_array_equal(session.decode([0], [3]), own.decode([0], [3]))
        for got, want in zip(session.score(tokens), own.score(tokens), strict=True):
            np.testing.assert_array_equal(got, want)
    finally:
        session.close()
        own.close()


def test_a_pass_without_memory_is_said(on_gpu: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(on_gpu)
    try:
        session.add()

        def fail(*_: Any) -> None:
            raise RuntimeError("CUDA: out of memory")

        monkeypatch.setattr(session._machine, "compute", fail)
        with pytest.raises(UsageError, match=r"GPU 0 is out of memory in the middle of a pass"):
            session.prefill(0, [1])
    finally:
        session.close()
