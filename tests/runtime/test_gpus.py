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
from gqsa_compiler.runtime.schema import Target
from gqsa_compiler.targets import SHARED_BYTES

# What it knows, how many GPUs there are and of which compute capability is said by -D.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return GPUS ? 0 : 100; }
int cuDriverGetVersion(int* version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int* count) { *count = GPUS; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "Toy GPU", size); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? CAPABILITY / 10 : CAPABILITY % 10;
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
        (("sm_80",), (8, 7), True),
        (("sm_80",), (8, 6), False),  # it has less shared memory
        (("sm_80",), (8, 9), False),
        (("compute_80", "sm_80"), (8, 6), True),
        (("sm_86",), (8, 9), True),
        (("sm_86",), (8, 7), True),
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
    with pytest.raises(ArtefactError, match=r"no NVIDIA driver .* --target cpu"):
        open_driver("libno-such-driver.so.1")


def build_driver(folder: Path, **says: int) -> Path:
    """Compile the driver above; what is left open says what a new one does of an H100."""
    source, path = folder / "driver.c", folder / "libdriver.so"
    source.write_text(DRIVER)
    facts = {"GPUS": 1, "VERSION": 13010, "CAPABILITY": 90, **says}
    defined = [f"-D{name}={value}" for name, value in facts.items()]
    subprocess.run(["gcc", "-shared", "-fPIC", *defined, str(source), "-o", str(path)], check=True)
    return path


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ({"GPUS": 0}, r"finds no GPU here .* nvidia-smi says, or compile .* --target cpu\.$"),
        ({"VERSION": 12080}, r"too old: it knows CUDA 12\.8 and 13\.0 .* driver 580 or later\.$"),
        ({"CAPABILITY": 89}, r"GPU here, Toy GPU, .* 8\.9; .* --target cuda:sm_89\.$"),
        ({"CAPABILITY": 75}, r"Toy GPU, .* 7\.5; the kernels need 8\.0 or later; .*--target cpu"),
        ({"CAPABILITY": 120}, r"Toy GPU, .* 12\.0; compile it again with --target cuda, whose PTX"),
        ({}, ""),
    ],
    ids=["no-gpu", "old", "other", "turing", "blackwell", "good"],
)
def test_an_artefact_meets_a_driver(
    says: dict[str, int], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the way from what the driver answers in C to the sentence, without TVM or CUDA."""
    path = build_driver(tmp_path, **says)
    monkeypatch.setattr(library, "open_driver", lambda: open_driver(str(path)))
    monkeypatch.setattr(library, "host_arch", lambda: "x86_64")
    target = Target("cuda:sm_90", "cuda", "sm_90", ("sm_90",), CUDA, "x86_64-linux-gnu")
    if not sentence:
        library.check_target(target)
        return
    with pytest.raises(ArtefactError, match=sentence) as raised:
        library.check_target(target)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("count", [0, 2])
def test_a_driver_is_asked(count: int, tmp_path: Path) -> None:
    path = build_driver(tmp_path, GPUS=count)
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
    assert [f"sm_{major}{minor}" for major, minor in gpus._BUILT_FOR] == sorted(SHARED_BYTES)
