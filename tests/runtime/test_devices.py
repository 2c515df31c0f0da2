"""Memory of a device: copies, and the sum that the cache is sized by."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import pytest

from gqsa_compiler.runtime import devices, library
from gqsa_compiler.runtime._ffi import tvm_ffi
from gqsa_compiler.runtime.devices import Device, fit_cache, out_of_memory
from gqsa_compiler.runtime.engine import Session
from gqsa_compiler.runtime.errors import ArtefactError, UsageError
from gqsa_compiler.runtime.gpus import CPU, CUDA
from gqsa_compiler.runtime.machine import Machine
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.model import Model, load
from gqsa_compiler.runtime.program import Program
from tests.runtime.toy import edit_manifest

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
    gpu = Device(CUDA)
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
        with pytest.raises(kind, match=r"The GPU is out of memory|driver gone"):
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
def gpu_artefact(monkeypatch: pytest.MonkeyPatch, copy: Path) -> Path:
    """Return the toy for what is taken for a GPU: the CPU again."""
    edit_manifest(copy, lambda m: m["variants"][0]["target"].update(kind="cuda", device_type=CUDA))
    monkeypatch.setattr(library, "check_target", lambda *_: None)
    monkeypatch.setattr(library, "CUDA_LIBRARY", library.RUNTIME_LIBRARIES[0])
    monkeypatch.setattr(library, "_load_cuda_runtime", lambda: None)
    monkeypatch.setitem(devices._NAMES, CUDA, "cpu")
    monkeypatch.setattr(Device, "vm_arguments", property(lambda _: (CPU, 0, 2)))
    monkeypatch.setattr(Device, "free_bytes", lambda _: 1 << 30)
    return copy


@pytest.fixture
def on_gpu(gpu_artefact: Path) -> Program:
    """Return its code and weights."""
    return Program(gpu_artefact, Manifest.read(gpu_artefact))


def noting(method: Callable[..., Any], threads: list[int]) -> Callable[..., Any]:
    """Wrap a method: it notes the thread that calls it."""

    def noted(*arguments: Any) -> Any:
        threads.append(threading.get_ident())
        return method(*arguments)

    return noted


def test_all_is_asked_of_a_gpu_on_one_thread(
    gpu_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions of several numbers of threads, and a model that is loaded while another runs."""
    asked: list[int] = []
    for name in ("upload", "download", "empty", "free_bytes"):
        monkeypatch.setattr(Device, name, noting(getattr(Device, name), asked))
    monkeypatch.setattr(Machine, "free", noting(Machine.free, asked))
    with load(gpu_artefact, threads=1) as first, closing(first.session()) as more:
        assert first.generate([5], max_tokens=2, ignore_eos=True).token_ids
        more.prefill(more.add(), [3])
        with load(gpu_artefact) as second:
            assert len(list(second.score([4, 5]))) == 1
            inside = second._session.run(lambda: load(gpu_artefact))  # where it would wait for it
            inside.close()
    assert len(set(asked)) == 1
    assert threading.get_ident() not in asked


def test_a_gpu_s_memory_is_freed_on_its_thread(
    gpu_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that nobody closes, and whoever drops it."""
    freed: list[int] = []

    def upload(*_: Any) -> Any:
        array = np.zeros(4, np.float32)
        finalize(array, noting(int, freed))
        return tvm_ffi.from_dlpack(array)

    monkeypatch.setattr(Device, "upload", upload)
    monkeypatch.setattr(Machine, "free", noting(Machine.free, freed))
    with load(gpu_artefact, threads=1) as kept:
        thread = kept._session.run(threading.get_ident)
        dropped = load(gpu_artefact)
        weights = len(dropped.manifest.parameters)
        del dropped
        gc.collect()
        assert freed == []
        kept._session.length(kept._session.add())
        assert freed == [thread] * (1 + weights)


def test_what_a_failed_load_has_copied_is_freed_on_the_thread(
    gpu_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[int] = []
    with load(gpu_artefact, threads=1) as kept:

        def upload(*_: Any) -> Any:
            if freed or len(arrays) == 3:
                raise ArtefactError("The GPU is full.")
            array = np.zeros(4, np.float32)
            arrays.append(finalize(array, noting(int, freed)))
            return tvm_ffi.from_dlpack(array)

        arrays: list[Any] = []
        monkeypatch.setattr(Device, "upload", upload)
        with pytest.raises(ArtefactError, match="is full") as caught:
            load(gpu_artefact)
        thread = kept._session.run(threading.get_ident)
        assert freed == [thread] * 3
        assert caught.value.__traceback__ is not None


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
        with pytest.raises(UsageError, match=r"GPU is out of memory in the middle of a pass"):
            session.prefill(0, [1])
    finally:
        session.close()
