"""Recipe names and their limits."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gqsa_compiler.compress import Recipe, parse_recipe
from gqsa_compiler.errors import UsageError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w4s30g16", Recipe(4, 30, 16)),
        ("w4s0g128", Recipe(4, 0, 128)),
        ("w4s95g8", Recipe(4, 95, 8)),
    ],
)
def test_reads_names(name: str, expected: Recipe) -> None:
    assert parse_recipe(name) == expected
    assert expected.name == name


def test_sparsity_is_a_share() -> None:
    assert parse_recipe("w4s30g16").sparsity == 0.3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w8s30g16", "4 bits: use w4s30g16"),
        ("w4s96g16", "96% sparsity; it must be 0 to 95"),
        ("w4s30g12", "groups of 12; a group is one of 8, 16"),
        ("w4s30g512", "groups of 512"),
        ("w4s30", "not a recipe; recipes are named"),
        ("w4s30g16x", "not a recipe"),
        ("W4S30G16", "not a recipe"),
        ("", "not a recipe"),
        ("w4s٣٠g16", "not a recipe"),
        ("w4s030g16", "not a recipe"),
        ("w04s30g16", "not a recipe"),
        ("w4s30g016", "not a recipe"),
        ("w4s30g16\n", "not a recipe"),
    ],
)
def test_refuses_what_it_cannot_do(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe(name)


def test_reading_a_recipe_loads_no_torch() -> None:
    code = (
        "import sys; from gqsa_compiler.compress import parse_recipe; parse_recipe('w4s30g16');"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
