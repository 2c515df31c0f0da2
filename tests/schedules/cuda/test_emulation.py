"""The emulation itself: it computes what CUDA does, and stops at what CUDA leaves undefined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.schedules.cuda.emulation.host import Launch
from tests.schedules.cuda.emulation.run import EmulationError, Executable

KERNELS = Path(__file__).with_name("emulation_test.cu")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Executable:
    return Executable.of(KERNELS.read_text(encoding="utf-8"), tmp_path_factory.mktemp("emulation"))


def launch(
    device: Executable, name: str, *arguments: object, order: int = 0, grid: int = 1
) -> None:
    args = tuple(arguments)
    device.launch(Launch(name, args, (grid, 1, 1), (64, 1, 1), 256), order)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [0, 1, 7])
def test_threads_meet_at_barriers_and_shuffles(device: Executable, order: int) -> None:
    out = np.arange(192, dtype=np.float32)
    launch(device, "reverse", out, order=order, grid=3)
    np.testing.assert_array_equal(out.reshape(3, 64), np.arange(192).reshape(3, 64)[:, ::-1])
    values = np.arange(64, dtype=np.float32)
    launch(device, "warp_total", values, order=order)
    np.testing.assert_array_equal(values, np.repeat([496, 1520], 32))


def test_a_counter_finds_the_last_block_and_wraps(device: Executable) -> None:
    count, out = np.zeros(1, np.uint32), np.zeros(1, np.float32)
    for order in (0, 1, 5):
        launch(device, "last_block", count, out, order=order, grid=9)
    assert (count[0], out[0]) == (0, 3)


def test_threads_that_have_ended_are_not_waited_for(device: Executable) -> None:
    out = np.zeros(64, np.float32)
    launch(device, "early_exit", out)
    assert out.tolist() == [0] * 32 + [7] * 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two_barriers", "divergence: threads wait at different barriers"),
        ("lonely_shuffle", "deadlock"),
        ("outside_shared", "memory outside a buffer"),
    ],
)
def test_what_cuda_leaves_undefined_is_an_error(
    device: Executable, name: str, message: str
) -> None:
    with pytest.raises(EmulationError, match=message):
        launch(device, name, np.zeros(64, np.float32))


@pytest.mark.parametrize("place", [-64, 64])
def test_accesses_outside_an_argument_are_an_error(device: Executable, place: int) -> None:
    launch(device, "outside", np.zeros(64, np.float32), 63)
    with pytest.raises(EmulationError, match="memory outside a buffer"):
        launch(device, "outside", np.zeros(64, np.float32), place * 16)


def test_a_missing_barrier_shows_in_another_order(device: Executable) -> None:
    """Shared memory begins as NaN, and no order of the threads is the only one."""
    out = np.zeros(64, np.float32)
    launch(device, "no_barrier", out, order=3)
    assert np.isnan(out).any()


def test_halves_are_rounded_after_every_operation(device: Executable) -> None:
    out = np.zeros(9, np.float32)
    out[:4] = 2049.0, 0.1, 3.0, 0.1
    launch(device, "halves", out)
    half = np.float16
    exact = np.float64(half(0.1)) ** 2 - 1
    assert out[4:6].tolist() == [float(half(2048 * 3 + 1)), float(half(exact))]
    assert out[6:].tolist() == [-3 * 1 + 5 * 255 + 100, -3 * 3 + 5 * 4 + 100, 1], "dp2a, byte_perm"
