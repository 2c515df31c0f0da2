"""Recipes by name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from gqsa_compiler.compress import Recipe, parse_recipe
from gqsa_compiler.compress.recipes.presets import default_stages, preset_names, with_stages
from gqsa_compiler.compress.recipes.recipe import STAGES, BlockStage, Head, ModelStage
from gqsa_compiler.errors import UsageError
from gqsa_compiler.limits import BITS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w4s30g16", (4, 30, 16)),
        ("w4s0g128", (4, 0, 128)),
        ("w2s95g8", (2, 95, 8)),
        ("w3s5g64", (3, 5, 64)),
        ("w8s0g256", (8, 0, 256)),
    ],
)
def test_gqsa(name: str, expected: tuple[int, int, int]) -> None:
    recipe = parse_recipe(name)
    balance = "model" if recipe.sparsity else "matrix"
    head = Head(4, 32) if recipe.bits <= 4 else None
    wanted = Recipe(name, *expected, score="fisher", balance=balance, head=head)
    assert recipe.one_shot() == wanted
    stages = default_stages()
    assert (recipe.block, recipe.weights, recipe.scales) == stages
    assert recipe.stages == STAGES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rtn-w4g64", Recipe("", 4, 0, 64, solver="rtn")),
        ("rtn-w2g128", Recipe("", 2, 0, 128, solver="rtn")),
        ("gptq-w3g128", Recipe("", 3, 0, 128)),
        ("2of4-w4g128", Recipe("", 4, 0, 128, structure="2:4")),
        ("magnitude-w4s50g16", Recipe("", 4, 50, 16, score="magnitude", solver="rtn")),
        ("wanda-w4s40g32", Recipe("", 4, 40, 32, score="wanda", solver="rtn", balance="row")),
    ],
)
def test_baselines(name: str, expected: Recipe) -> None:
    name = f"baseline/{name}"
    assert parse_recipe(name) == replace(expected, name=name)
    stages = default_stages()
    assert parse_recipe(name, ["scales"]) == replace(expected, name=name, scales=stages.scales)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("percent", [0, 30, 95])
def test_default_stages_go_with_every_recipe(bits: int, percent: int) -> None:
    parse_recipe(f"w{bits}s{percent}g16")
    parse_recipe(f"baseline/2of4-w{bits}g16", STAGES)


def test_what_is_listed_exists() -> None:
    names = preset_names()
    for name, about in names.items():
        assert parse_recipe(name).name == name
        assert len(about) > 10
    assert {"w4s50g16", "w4s30g16", "w4s0g128", "baseline/rtn-w2g64"} <= set(names)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (["none"], ()),
        ([], ()),
        (["block"], ("block",)),
        (["scales", "block"], ("block", "scales")),
        (STAGES, STAGES),
    ],
)
@pytest.mark.parametrize("name", ["w4s50g16", "baseline/2of4-w4g128"])
def test_stages_can_be_chosen(name: str, stages: list[str], expected: tuple[str, ...]) -> None:
    recipe = parse_recipe(name, stages)
    assert recipe.stages == expected
    assert recipe.one_shot() == parse_recipe(name).one_shot()


def test_chosen_stages_keep_their_settings() -> None:
    block = BlockStage(epochs=7)
    recipe = replace(parse_recipe("w4s50g16", ["none"]), block=block)
    chosen = with_stages(recipe, ["block", "scales"])
    assert chosen.block == block
    assert chosen.scales == default_stages().scales


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["blok"], "no training stage 'blok'; did you mean block[?] Name any of block, weights"),
        (["e2e"], "no training stage 'e2e'[.] Name any"),
        (["none", "block"], "name it alone"),
        ([""], "no training stage ''"),
        (["block", "scales", "block"], "stage block is named twice; each runs once, in the order"),
    ],
)
def test_unknown_stages(stages: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe("w4s50g16", stages)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w5s30g16", "bits is 5; it must be one of 2, 3, 4, 8"),
        ("w4s96g16", "sparsity_percent is 96; it must be 0 to 95"),
        ("w4s30g12", "group_size is 12; it must be one of 8, 16"),
        ("w4s30g512", "group_size is 512"),
        ("baseline/rtn-w4g100", "group_size is 100"),
        ("w4s50", r"'w4s50' is not a recipe; did you mean w4s50g\d\d"),
        ("baseline/gptq-w4s50g64", r"not a recipe; did you mean baseline/gptq-w4g64"),
        ("baseline/magnitude-w4g16", "not a recipe"),
        ("baseline/awq-w4g64", "not a recipe"),
        ("baseline/", "not a recipe"),
        ("int4", "'int4' is not a recipe[.] Recipes are w<bits>"),
        ("w4s30g16x", "not a recipe"),
        ("W4S30G16", "not a recipe"),
        ("", "not a recipe"),
        ("w4s٣٠g16", "not a recipe"),
        ("w4s030g16", "not a recipe"),
        ("w04s30g16", "not a recipe"),
        ("w4s30g016", "not a recipe"),
        ("w4s30g16\n", "not a recipe"),
        ("w4s" + "9" * 5000 + "g16", "not a recipe"),
    ],
)
def test_refuses_what_does_not_exist(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe(name)


def test_reading_a_recipe_loads_no_torch() -> None:
    code = (
        "import sys; from gqsa_compiler.compress import parse_recipe; parse_recipe('w4s30g16');"
        "from gqsa_compiler.compress.recipes import recipe_file;"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_documentation_has_the_default_settings() -> None:
    table = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text().splitlines()
    for each in fields(BlockStage) + fields(ModelStage):
        (row,) = (line for line in table if line.startswith(f"| `{each.name}` | "))
        written = [cell.strip() for cell in row.split("|")[2].split(",")]
        for stage, text in zip(default_stages(), written, strict=True):
            default = getattr(stage, each.name, None)
            assert (None if text == "-" else float(text)) == default, each.name
