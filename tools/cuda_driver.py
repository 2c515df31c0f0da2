"""NVIDIA's driver through ctypes: memory, modules, launches, graphs and times of one GPU.

Only the standard library and numpy, so that kernels run where there is neither TVM nor PyTorch.
Signatures are those of cuda.h of CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LIBRARY = "libcuda.so.1"
_DEFAULT_SHARED = 48 * 1024  # more has to be asked for
_ATTRIBUTES = {
    "processors": 16,  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    "clock_khz": 13,
    "memory_clock_khz": 36,
    "l2_bytes": 38,
    "major": 75,
    "minor": 76,
    "shared_bytes": 97,  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
}
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


class DriverError(Exception):
    """A call of the driver failed; the message says which and how."""


class Device(Protocol):
    """What the benchmarks ask of a GPU; addresses and handles are integers."""

    def info(self) -> dict[str, Any]:
        """Describe the device and its driver."""

    def load(self, image: bytes) -> int:
        """Load machine code; returns a module."""

    def function(self, module: int, name: str) -> int:
        """Find a kernel of a module."""

    def allocate(self, size: int) -> int:
        """Allocate so many bytes."""

    def free(self, address: int) -> None:
        """Free what was allocated."""

    def upload(self, address: int, array: Array) -> None:
        """Copy an array to the device."""

    def download(self, address: int, array: Array) -> None:
        """Copy to an array from the device; waits for all work."""

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy on the device, after and before what is launched around it."""

    def fill(self, address: int, value: int, size: int) -> None:
        """Set bytes on the device; waits for all work."""

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        shared_bytes: int,
        arguments: Sequence[int],
    ) -> None:
        """Launch a kernel; returns at once. An argument is an address or an integer."""

    def synchronize(self) -> None:
        """Wait for all work; an error of a kernel shows here."""

    def time(self, work: Callable[[], None], repeats: int) -> list[float]:
        """Capture what `work` launches in a graph and time its replays, in seconds each."""


class Driver:
    """`Device` on a GPU.

    Parameters
    ----------
    ordinal : int
        Which of the visible GPUs.
    library : str

    Raises
    ------
    DriverError
        There is no driver or no GPU.
    """

    def __init__(self, ordinal: int = 0, library: str = LIBRARY) -> None:
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise DriverError(f"There is no NVIDIA driver here: {error}") from None
        self._call("cuInit", ctypes.c_uint(0))
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(ordinal))
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))
        self._shared: dict[int, int] = {}

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._cuda, name)(*arguments)
        if result:
            text = ctypes.c_char_p()
            known = self._cuda.cuGetErrorString(ctypes.c_int(result), ctypes.byref(text)) == 0
            said = text.value.decode() if known and text.value else "unknown error"
            raise DriverError(f"{name}: {said} (error {result})")

    def info(self) -> dict[str, Any]:
        """Describe the device: name, memory, `processors`, caches, clocks, ``arch``, driver API."""
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, ctypes.c_int(len(name)), self._device)
        version, value = ctypes.c_int(), ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        found: dict[str, Any] = {}
        for key, number in _ATTRIBUTES.items():
            code = ctypes.c_int(number)
            self._call("cuDeviceGetAttribute", ctypes.byref(value), code, self._device)
            found[key] = value.value
        arch = f"sm_{found.pop('major')}{found.pop('minor')}"
        return {
            "name": name.value.decode(),
            "arch": arch,
            "memory_bytes": total.value,
            "free_bytes": free.value,
            "driver_api": f"{version.value // 1000}.{version.value % 1000 // 10}",
            **found,
        }

    def load(self, image: bytes) -> int:
        """Load a cubin or fatbin."""
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        return int(module.value or 0)

    def function(self, module: int, name: str) -> int:
        """Find a kernel of a module."""
        function = ctypes.c_void_p()
        found = ctypes.byref(function)
        text = ctypes.c_char_p(name.encode())
        self._call("cuModuleGetFunction", found, ctypes.c_void_p(module), text)
        return int(function.value or 0)

    def allocate(self, size: int) -> int:
        """Allocate so many bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        """Free what was allocated."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: Array) -> None:
        """Copy an array to the device."""
        whole = np.ascontiguousarray(array)
        place = ctypes.c_void_p(whole.ctypes.data)
        self._call(
            "cuMemcpyHtoD_v2", ctypes.c_uint64(address), place, ctypes.c_size_t(whole.nbytes)
        )

    def download(self, address: int, array: Array) -> None:
        """Copy to a contiguous array from the device; waits for all work."""
        self.synchronize()
        place = ctypes.c_void_p(array.ctypes.data)
        self._call(
            "cuMemcpyDtoH_v2", place, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes)
        )

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy on the device, in the order of launches."""
        addresses = ctypes.c_uint64(to), ctypes.c_uint64(source)
        self._call("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(size), self._stream)

    def fill(self, address: int, value: int, size: int) -> None:
        """Set bytes on the device; waits for all work before and after."""
        self.synchronize()
        byte = ctypes.c_ubyte(value)
        self._call("cuMemsetD8_v2", ctypes.c_uint64(address), byte, ctypes.c_size_t(size))
        self.synchronize()

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        shared_bytes: int,
        arguments: Sequence[int],
    ) -> None:
        """Launch a kernel; returns at once.

        Integers are passed in 8 bytes: a kernel that takes 4 reads the lower ones.
        """
        handle = ctypes.c_void_p(function)
        if shared_bytes > max(_DEFAULT_SHARED, self._shared.get(function, 0)):
            more = ctypes.c_int(shared_bytes)
            self._call("cuFuncSetAttribute", handle, ctypes.c_int(_MAX_DYNAMIC_SHARED), more)
            self._shared[function] = shared_bytes
        values = [ctypes.c_uint64(value & 0xFFFFFFFFFFFFFFFF) for value in arguments]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = [ctypes.c_uint(size) for size in (*grid, *threads, shared_bytes)]
        self._call("cuLaunchKernel", handle, *sizes, self._stream, places, ctypes.c_void_p(None))

    def synchronize(self) -> None:
        """Wait for all work; an error of a kernel shows here."""
        self._call("cuCtxSynchronize")

    def time(self, work: Callable[[], None], repeats: int) -> list[float]:
        """Capture what `work` launches in a graph and time its replays, in seconds each."""
        self.synchronize()
        mode = ctypes.c_int(_CAPTURE_THREAD_LOCAL)
        self._call("cuStreamBeginCapture_v2", self._stream, mode)
        graph = ctypes.c_void_p()
        try:
            work()
        except BaseException:
            self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))
            raise
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        ready = ctypes.c_void_p()
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0))
        events = [self._event() for _ in range(repeats + 1)]
        for _ in range(3):
            self._call("cuGraphLaunch", ready, self._stream)
        self.synchronize()
        self._call("cuEventRecord", events[0], self._stream)
        for event in events[1:]:
            self._call("cuGraphLaunch", ready, self._stream)
            self._call("cuEventRecord", event, self._stream)
        self.synchronize()
        times = []
        for begin, end in itertools.pairwise(events):
            milliseconds = ctypes.c_float()
            self._call("cuEventElapsedTime", ctypes.byref(milliseconds), begin, end)
            times.append(milliseconds.value / 1e3)
        for event in events:
            self._call("cuEventDestroy_v2", event)
        self._call("cuGraphExecDestroy", ready)
        self._call("cuGraphDestroy", graph)
        return times

    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        return event
