"""What the Arm kernels' packed tensors have besides the x86 kernels' records."""

from __future__ import annotations

import numpy as np
import pytest

from gqsa_compiler.schedules.arm.bsr import ArmBsrInt2, ArmBsrInt4, ArmBsrInt8
from gqsa_compiler.schedules.x86.bsr import X86BsrInt4, X86BsrInt8
from gqsa_compiler.targets import parse_target
from tests.schedules.linear_cases import random_keep, random_layer, spec_of

TARGET = parse_target("aarch64")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 8), (4, 16), (4, 128), (8, 32)])
def test_constants_are_128_times_the_sum_of_a_row(
    bits: int, size: int, symmetric: bool, full: bool
) -> None:
    rng = np.random.default_rng(bits)
    rule = {2: ArmBsrInt2(), 3: ArmBsrInt4(), 4: ArmBsrInt4(), 8: ArmBsrInt8()}[bits]
    keep = np.ones((11, 9), bool) if full else random_keep((11, 9), rng, 0.4)
    keep[3] = full
    layer = random_layer(keep, size, rng, bits=bits, symmetric=symmetric)
    spec = spec_of(layer, activation_dtype="int16")
    config = rule.space(spec, TARGET)[0]
    constants = rule.pack(spec, config, [layer])["constants"]
    exact = 128 * rule.stored(spec, config, layer).sum(1)
    np.testing.assert_allclose(constants, exact, rtol=1e-5, atol=1e-5)
    assert constants.dtype == np.float32


def test_the_rest_is_what_x86_reads() -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(random_keep((11, 9), rng, 0.4), 16, rng)
    spec = spec_of(layer, activation_dtype="int16")
    config = ArmBsrInt4().space(spec, TARGET)[0]
    ours, theirs = (
        ArmBsrInt4().pack(spec, config, [layer]),
        X86BsrInt4().pack(spec, config, [layer]),
    )
    assert set(ours) - set(theirs) == {"constants"}
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_symmetric_codes_of_8_bits_are_stored_signed() -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(np.ones((3, 2), bool), 32, rng, bits=8, symmetric=True)
    spec = spec_of(layer, activation_dtype="int16")
    config = ArmBsrInt8().space(spec, TARGET)[0]
    ours = ArmBsrInt8().pack(spec, config, [layer])["records"].reshape(6, -1)
    theirs = X86BsrInt8().pack(spec, config, [layer])["records"].reshape(6, -1)
    unsigned = theirs[:, :32].astype(np.int64) - 128
    np.testing.assert_array_equal(ours[:, :32].view(np.int8), unsigned)
    np.testing.assert_array_equal(ours[:, 32:], theirs[:, 32:])
