"""Where the compiled code runs: the CPU, whose memory is ours, or a GPU with memory of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqsa_compiler.runtime._ffi import tvm_ffi
from gqsa_compiler.runtime.errors import ArtefactError, UsageError
from gqsa_compiler.runtime.gpus import CPU, CUDA
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.params import ALIGNMENT

_POOLED_ALLOCATOR = 2
_AVAILABLE_MEMORY = 15  # DeviceAttrKind::kAvailableGlobalMemory
_RUNTIME_BYTES = (128 << 20) + (256 << 20)
"""What TVM's cache takes for its tables (32 Mi integers, `attn_utils.h`), and room for launches'
scratch and the driver's own."""
_COPIED_BYTES = 512 << 20  # many times a GPU's second-level cache
_MEMORY_WORDS = ("out of memory", "cudaErrorMemoryAllocation", "bad_alloc")


@dataclass(frozen=True)
class Device:
    """One device: of GPUs the first that the driver shows, which CUDA_VISIBLE_DEVICES chooses.

    Parameters
    ----------
    kind : int
        DLPack's number of its type.
    """

    kind: int = CPU

    @property
    def is_cpu(self) -> bool:
        """Whether it shares the memory of this program."""
        return self.kind == CPU

    @property
    def vm_arguments(self) -> tuple[int, ...]:
        """What the virtual machine is initialised with: this device, and the CPU for shapes."""
        own = (self.kind, 0, _POOLED_ALLOCATOR)
        return own if self.is_cpu else (*own, CPU, 0, _POOLED_ALLOCATOR)

    def upload(self, tensor: Any) -> Any:
        """Return a tensor of the CPU's memory on this device: itself on the CPU, else a copy.

        Raises
        ------
        ArtefactError
            The device has not enough memory.
        """
        if self.is_cpu:
            return tensor
        try:
            target = self.empty(tuple(tensor.shape), tensor.dtype)
            _call("runtime.TVMTensorCopyFromTo", tensor, target)
            return target
        except Exception as error:
            if out_of_memory(error):
                raise ArtefactError(
                    "The GPU is out of memory while the weights are loaded; free some, or choose "
                    "a model that fits."
                ) from None
            raise

    def download(self, tensor: Any) -> np.ndarray:
        """Return a tensor of this device as an array: a view on the CPU, else a copy."""
        if self.is_cpu:
            view: np.ndarray = np.from_dlpack(tensor)
            return view
        found = np.empty(tuple(tensor.shape), str(tensor.dtype))
        _call("runtime.TVMTensorCopyFromTo", tensor, tvm_ffi.from_dlpack(found))
        return found

    def write(self, array: np.ndarray, tensor: Any) -> None:
        """Copy an array into a tensor of this device that has its shape and dtype."""
        _call("runtime.TVMTensorCopyFromTo", tvm_ffi.from_dlpack(array), tensor)

    def beginning(self, tensor: Any, length: int) -> Any:
        """Return the first elements of a tensor [n], in the same memory."""
        create = "runtime.TVMTensorCreateView"
        return _call(create, tensor, tvm_ffi.Shape((length,)), tensor.dtype, 0)

    def free_bytes(self) -> int | None:
        """Return the bytes of memory that are free; None on the CPU, whose pages come when used."""
        if self.is_cpu:
            return None
        return int(_call("runtime.GetDeviceAttr", self.kind, 0, _AVAILABLE_MEMORY))

    def copy_bandwidth(self, size: int = _COPIED_BYTES, repeats: int = 10) -> float:
        """Measure the rate at which this device copies its own memory.

        Returns
        -------
        float
            Bytes a second, read and written ones counted, of the best repeat.
        """
        source, target = (self.empty((size,), "uint8") for _ in range(2))
        best = 0.0
        for _ in range(repeats):
            begin = time.perf_counter()
            _call("runtime.TVMTensorCopyFromTo", source, target)
            _call("runtime.Device_StreamSync", self.memory, 0)
            best = max(best, 2 * size / (time.perf_counter() - begin))
        return best

    @property
    def memory(self) -> Any:
        """DLPack's name of this device, for TVM."""
        return tvm_ffi.device(_NAMES[self.kind], 0)

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Make a tensor on this device, of whatever its memory holds."""
        make = "runtime.TVMTensorAllocWithScope"
        return _call(make, tvm_ffi.Shape(shape), tvm_ffi.dtype(str(dtype)), self.memory, None)


_NAMES = {CPU: "cpu", CUDA: "cuda"}


def _call(name: str, *arguments: Any) -> Any:
    return tvm_ffi.get_global_func(name)(*arguments)


def aligned(ids: np.ndarray) -> np.ndarray:
    """Copy int32 [n] to where TVM's code takes arguments to be; numpy only promises 16 bytes."""
    buffer = np.empty(len(ids) + ALIGNMENT // 4, np.int32)
    start = -buffer.ctypes.data % ALIGNMENT // 4
    buffer[start : start + len(ids)] = ids
    return buffer[start : start + len(ids)]


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception of TVM's says that a device's memory is not enough."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _MEMORY_WORDS)


@dataclass(frozen=True)
class MemorySum:
    """What a session on a GPU takes of its memory, in bytes, and what was free before it.

    Parameters
    ----------
    free : int
        With the weights loaded.
    weights, workspace, cache : int
    tokens : int
        That the cache holds, in all sequences.
    sequences, context : int
        At most so many at once, of so many tokens each.
    """

    free: int
    weights: int
    workspace: int
    cache: int
    tokens: int
    sequences: int
    context: int

    def text(self) -> str:
        """Say it in one line."""
        return (
            f"GPU memory: weights {_gb(self.weights)}, cache {_gb(self.cache)} for "
            f"{self.tokens} tokens ({self.sequences} x {self.context}), workspace "
            f"{_gb(self.workspace)}; {_gb(self.free)} were free."
        )


def fit_cache(
    manifest: Manifest, free: int, sequences: int, context: int, *, fewer: bool, shorter: bool
) -> MemorySum:
    """Fit the key/value cache into a GPU's free memory.

    Parameters
    ----------
    manifest : Manifest
    free : int
        Bytes, with the weights loaded.
    sequences, context : int
        What is wanted.
    fewer, shorter : bool
        Fewer sequences will do, since nobody asked for a number; fewer tokens of each.

    Raises
    ------
    UsageError
        They do not fit.
    """
    page, each = manifest.kv_cache.page_size, manifest.kv_cache.bytes_per_token
    workspace = manifest.memory.workspace_bytes + _RUNTIME_BYTES
    room = max(0, free - workspace) // each // page * page
    if fewer:
        sequences = max(1, min(sequences, room // (-(-context // page) * page)))
    if shorter:
        context = min(context, room // sequences // page * page) or context
    tokens = -(-context // page) * page * sequences
    found = MemorySum(
        free, manifest.memory.weights_bytes, workspace, tokens * each, tokens, sequences, context
    )
    if tokens > room:
        raise UsageError(
            f"The key/value cache of {tokens} tokens ({_gb(tokens * each)}) and "
            f"{_gb(workspace)} of workspace do not fit the {_gb(free)} that are free on the GPU "
            f"beside the weights; {room} tokens would. Ask for a smaller context or batch."
        )
    return found


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


__all__ = ["Device", "MemorySum", "aligned", "fit_cache", "out_of_memory"]
