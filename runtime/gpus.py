"""The GPUs of this machine, as NVIDIA's driver tells them, and whether one can run an artefact.

The driver is asked through its C interface, before anything of TVM's or CUDA's is loaded: those
say in a stack trace what is a sentence here.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gqsa_compiler.runtime.errors import ArtefactError

CPU, CUDA = 1, 2
"""DLPack's numbers of the device types."""
LEAST_DRIVER = (13, 0)
"""The release of CUDA that TVM's runtime was built with: the driver must know it."""
_BUILT_FOR = ((8, 0), (8, 6), (8, 9), (9, 0))
"""What machine code can be compiled for (`gqsa_compiler.targets.SHARED_BYTES`), ascending."""
_SMALL = ((8, 6), (8, 9))
"""GPUs whose blocks cannot have as much shared memory as kernels for 8.0 may ask for."""
_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_CODE = re.compile(r"(sm|compute)_(\d+)(\d)")


class Driver(Protocol):
    """What is asked of a driver."""

    def version(self) -> tuple[int, int]:
        """Return the newest release of CUDA that it knows."""

    def count(self) -> int:
        """Count the GPUs."""

    def capability(self, device: int) -> tuple[int, int]:
        """Return a GPU's compute capability, major and minor."""

    def name(self, device: int) -> str:
        """Return a GPU's name."""


@dataclass(frozen=True)
class CudaDriver:
    """NVIDIA's driver, initialised."""

    library: Any

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise ArtefactError(
                f"NVIDIA's driver fails ({name} returns {status}); see what nvidia-smi says."
            )

    def version(self) -> tuple[int, int]:
        """Return the newest release of CUDA that it knows."""
        value = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(value))
        return value.value // 1000, value.value % 1000 // 10

    def count(self) -> int:
        """Count the GPUs."""
        value = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(value))
        return value.value

    def capability(self, device: int) -> tuple[int, int]:
        """Return a GPU's compute capability, major and minor."""
        return self._attribute(_MAJOR, device), self._attribute(_MINOR, device)

    def name(self, device: int) -> str:
        """Return a GPU's name."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), device)
        return text.value.decode(errors="replace")

    def _attribute(self, attribute: int, device: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value


def open_driver(library: str = _LIBRARY) -> CudaDriver:
    """Load and initialise NVIDIA's driver.

    Raises
    ------
    ArtefactError
        There is none, or no GPU that it drives.
    """
    try:
        loaded = ctypes.CDLL(library)
    except OSError:
        raise ArtefactError(
            f"This machine has no NVIDIA driver ({library} cannot be loaded), so nothing can run "
            "on a GPU; install the driver, or compile for this machine's CPU with --target cpu."
        ) from None
    driver = CudaDriver(loaded)
    status = loaded.cuInit(0)
    if status != 0 or driver.count() == 0:
        raise ArtefactError(
            f"NVIDIA's driver finds no GPU here (cuInit returns {status}); see what nvidia-smi "
            "says, or compile for this machine's CPU with --target cpu."
        )
    return driver


def check_gpu(name: str, code: Sequence[str], driver: Driver) -> None:
    """Refuse a driver that is too old, and a GPU that none of the code is for.

    It is the first that the driver shows: of several CUDA_VISIBLE_DEVICES chooses.

    Parameters
    ----------
    name : str
        The target's, for the message.
    code : sequence of str
        What the artefact holds: ``sm_90`` (machine code) or ``compute_80`` (PTX), see `runs`.
    driver : Driver

    Raises
    ------
    ArtefactError
    """
    have = driver.version()
    if have < LEAST_DRIVER:
        raise ArtefactError(
            f"NVIDIA's driver is too old: it knows CUDA {have[0]}.{have[1]} and "
            f"{LEAST_DRIVER[0]}.{LEAST_DRIVER[1]} is needed; install driver 580 or later."
        )
    capability = driver.capability(0)
    if not any(runs(item, capability) for item in code):
        major, minor = capability
        if capability in _BUILT_FOR:
            remedy = f"compile it again with --target cuda:sm_{major}{minor}"
        elif capability > _BUILT_FOR[0]:
            remedy = "compile it again with --target cuda, whose PTX its driver translates"
        else:
            remedy = "the kernels need 8.0 or later; compile for this machine's CPU (--target cpu)"
        raise ArtefactError(
            f"This artefact was compiled for {name} ({', '.join(code)}) and the GPU here, "
            f"{driver.name(0)}, has compute capability {major}.{minor}; {remedy}."
        )


def runs(code: str, capability: tuple[int, int]) -> bool:
    """Tell whether a GPU of a compute capability can run what a code says it is.

    Machine code is for its own and later ones of the same major number, unless they have less
    shared memory; PTX, whose kernels ask for no more than every GPU has, for all later ones.
    """
    found = _CODE.fullmatch(code)
    if found is None:
        return False
    built = int(found[2]), int(found[3])
    if found[1] == "compute":
        return built <= capability
    fits = built[0] == capability[0] and built <= capability
    return fits and not (capability in _SMALL and built not in _SMALL)


__all__ = [
    "CPU",
    "CUDA",
    "LEAST_DRIVER",
    "CudaDriver",
    "Driver",
    "check_gpu",
    "open_driver",
    "runs",
]
