"""The driver's C interface as the benchmarks call it, against a driver made for this test."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_driver import Driver, DriverError
from cuda_timing import copies_needed, copy_bandwidth, summarise, time_calls


@pytest.fixture
def device(fake_driver: str) -> Driver:
    return Driver(library=fake_driver)


def test_the_device_is_described(device: Driver) -> None:
    info = device.info()
    assert (info["name"], info["arch"], info["driver_api"]) == ("Fake GPU", "sm_90", "13.1")
    assert (info["processors"], info["l2_bytes"]) == (132, 60 << 20)
    assert (info["memory_bytes"], info["free_bytes"]) == (1 << 37, 1 << 36)


def test_memory_goes_there_and_back(device: Driver) -> None:
    data = np.arange(12, dtype=np.float32).reshape(3, 4)
    one, two = device.allocate(data.nbytes), device.allocate(data.nbytes)
    device.upload(one, data.T)
    device.copy(two, one, data.nbytes)
    back = np.empty((4, 3), np.float32)
    device.download(two, back)
    np.testing.assert_array_equal(back, data.T)
    device.fill(two, 0xFF, data.nbytes)
    device.download(two, back)
    assert np.isnan(back).all()
    device.free(one)
    device.free(two)


def test_kernels_get_their_arguments(device: Driver) -> None:
    function = device.function(device.load(b"\x7fELF\0code"), "add")
    values = np.zeros(5, np.float32)
    address = device.allocate(values.nbytes)
    device.upload(address, values)
    device.launch(function, (7, 2, 1), (64, 1, 1), 0, [address, 4, -3])
    device.launch(function, (7, 2, 1), (64, 1, 1), 101_376, [address, 2, 1 << 20])
    device.download(address, values)
    assert values.tolist() == [1048573, 1048573, -3, -3, 0]
    with pytest.raises(DriverError, match=r"cuLaunchKernel: unknown error \(error 1\)"):
        device.launch(function, (2, 7, 1), (64, 1, 1), 0, [address, 4, -3])
    with pytest.raises(DriverError, match=r"cuModuleGetFunction: .* \(error 500\)"):
        device.function(device.load(b"\x7fELF\0code"), "sub")
    with pytest.raises(DriverError, match="cuModuleLoadData"):
        device.load(b"source")


def test_graphs_are_timed(device: Driver) -> None:
    function = device.function(device.load(b"\x7fELF\0code"), "add")
    values = np.zeros(1, np.float32)
    address = device.allocate(values.nbytes)
    device.upload(address, values)

    def call(copy: int) -> None:
        device.launch(function, (7, 2, 1), (64, 1, 1), 0, [address, 1, copy])

    times = device.time(lambda: [call(1) for _ in range(4)] and None, 5)  # type: ignore[func-returns-value]
    assert times == pytest.approx([0.002] * 5)
    device.download(address, values)
    assert values[0] == 4 * (3 + 5)
    timing = time_calls(device, call, 3)
    assert timing.median == pytest.approx(0.5e-3)
    assert (timing.copies, timing.calls) == (3, 66)
    # One launch that fails leaves the stream as it was.
    with pytest.raises(ValueError, match="not this time"):
        device.time(_raise, 2)
    assert device.time(lambda: call(0), 2) == pytest.approx([0.0005] * 2)
    assert copy_bandwidth(device, 1 << 12) == pytest.approx(2 * (1 << 12) / 0.5e-3)


def _raise() -> None:
    raise ValueError("not this time")


def test_a_lost_device_is_an_error(fake_driver: str) -> None:
    """In a process of its own: the loss lasts, as a GPU's does."""
    code = (
        "import sys; sys.path += sys.argv[2:]\n"
        "from cuda_driver import *\n"
        "d = Driver(library=sys.argv[1]); f = d.function(d.load(b'\\x7fELF\\0'), 'add')\n"
        "d.launch(f, (7, 2, 1), (64, 1, 1), 0, [d.allocate(4), -1, 0])\n"
        "try:\n    d.synchronize()\nexcept DriverError as error:\n    print(error)\n"
    )
    tools = str(Path(__file__).resolve().parents[2] / "tools")
    command = [sys.executable, "-c", code, fake_driver, tools]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = "cuCtxSynchronize: an illegal memory access was encountered (error 700)"
    assert done.stdout.strip() == expected


def test_no_driver_is_one_sentence(fake_driver: str) -> None:
    with pytest.raises(DriverError, match="There is no NVIDIA driver here"):
        Driver(library="libcuda-that-is-not-there.so")
    with pytest.raises(DriverError, match=r"cuDeviceGet: .* \(error 101\)"):
        Driver(1, fake_driver)
    assert ctypes.sizeof(ctypes.c_size_t) == 8


def test_times_are_summed_up() -> None:
    timing = summarise([3e-3, 1e-3, 2e-3], 10, 4)
    assert timing.to_json() == {
        "median": pytest.approx(2e-4),
        "fastest": pytest.approx(1e-4),
        "slowest": pytest.approx(3e-4),
        "calls": 10,
        "replays": 3,
        "copies": 4,
    }
    assert copies_needed(10_000_000, 0) == 16
    assert copies_needed(10_000_000, 60_000_000) == 18
    assert copies_needed(400_000_000, 0) == 2
