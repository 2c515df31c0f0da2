"""What the driver says, and the sentences where a GPU cannot run an artefact."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from gqsa_compiler.runtime import gpus, library
from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.gpus import CUDA, CudaDriver, check_gpu, open_driver
from gqsa_compiler.runtime.manifest import Target

# Knows CUDA 13.1, and as many GPUs of compute capability 9.0 as -DGPUS says.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return GPUS ? 0 : 100; }
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuDeviceGetCount(int* count) { *count = GPUS; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "Toy GPU", size); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 0;
  return device < GPUS ? 0 : 101;
}
"""


class Fake:
    """A driver with one GPU."""

    def __init__(self, capability: tuple[int, int], version: tuple[int, int] = (13, 0)) -> None:
        self.found, self.known = capability, version

    def version(self) -> tuple[int, int]:
        """Return the release."""
        return self.known

    def count(self) -> int:
        """Return one."""
        return 1

    def capability(self, device: int) -> tuple[int, int]:
        """Return what it was made with."""
        return self.found

    def name(self, device: int) -> str:
        """Return its name."""
        return "Toy GPU"


@pytest.mark.parametrize(
    ("code", "capability", "runs"),
    [
        (("sm_90",), (9, 0), True),
        (("sm_80",), (8, 9), True),
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("compute_80", "sm_80"), (9, 0), True),
        (("compute_80", "sm_80"), (12, 0), True),
        (("compute_90", "sm_90"), (8, 9), False),
        (("gfx900",), (9, 0), False),
        ((), (9, 0), False),
    ],
)
def test_which_code_a_gpu_runs(
    code: tuple[str, ...], capability: tuple[int, int], runs: bool
) -> None:
    if runs:
        check_gpu("cuda", code, Fake(capability))
        return
    with pytest.raises(ArtefactError, match=r"the GPU here, Toy GPU, has compute capability"):
        check_gpu("cuda", code, Fake(capability))


def test_sentences() -> None:
    with pytest.raises(ArtefactError, match=r"knows CUDA 12.8 and 13.0 is needed; install driver"):
        check_gpu("cuda", ("sm_90",), Fake((9, 0), (12, 8)))
    with pytest.raises(ArtefactError, match=r"There is no GPU 1 here; the driver finds 1"):
        check_gpu("cuda", ("sm_90",), Fake((9, 0)), 1)
    with pytest.raises(ArtefactError, match=r"no NVIDIA driver .* --target cpu"):
        open_driver("libno-such-driver.so.1")


@pytest.mark.parametrize("count", [0, 2])
def test_a_driver_is_asked(count: int, tmp_path: Path) -> None:
    source, path = tmp_path / "driver.c", tmp_path / "libdriver.so"
    source.write_text(DRIVER)
    command = ["gcc", "-shared", "-fPIC", f"-DGPUS={count}", str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    if count == 0:
        with pytest.raises(ArtefactError, match=r"finds no GPU here .cuInit returns 100."):
            open_driver(str(path))
        return
    driver = open_driver(str(path))
    assert (driver.version(), driver.count()) == ((13, 1), 2)
    assert (driver.capability(1), driver.name(0)) == ((9, 0), "Toy GPU")
    with pytest.raises(ArtefactError, match=r"driver fails .cuDeviceGetAttribute returns 101."):
        driver.capability(2)
    assert CudaDriver(ctypes.CDLL(str(path))).count() == 2


def test_an_artefact_asks_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("cuda:sm_90", "cuda", "sm_90", ("sm_90",), CUDA, "x86_64-linux-gnu")
    monkeypatch.setattr(library, "host_arch", lambda: "x86_64")
    monkeypatch.setattr(library, "open_driver", lambda: Fake((9, 0)))
    library.check_target(target)
    monkeypatch.setattr(library, "open_driver", lambda: Fake((8, 6)))
    with pytest.raises(ArtefactError, match=r"compiled for cuda:sm_90 .* 8.6; .* cuda:sm_86"):
        library.check_target(target)
    with pytest.raises(ArtefactError, match=r"aarch64. and this machine is x86_64"):
        library.check_target(replace(target, triple="aarch64-linux-gnu"))
    with pytest.raises(ArtefactError, match=r"runtime cannot drive"):
        library.check_target(replace(target, device_type=7))
    assert gpus.LEAST_DRIVER == (13, 0)
