"""Recipes as YAML files: read strictly, and back from plain data exactly."""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.compress.recipes.budget import Budget
from gqsa_compiler.compress.recipes.presets import parse_recipe, preset_names
from gqsa_compiler.compress.recipes.recipe import BlockStage, Head, ModelStage, Recipe
from gqsa_compiler.compress.recipes.recipe_file import load_recipe, recipe_from_dict, recipe_to_dict
from gqsa_compiler.compress.recipes.strict_yaml import MAX_BYTES
from gqsa_compiler.errors import UsageError

PLAIN = "bits: 4\nsparsity_percent: 50\ngroup_size: 16\n"
DOCUMENT = Path(__file__).parents[3] / "docs" / "recipes.md"


def load(tmp_path: Path, text: str | bytes, stages: list[str] | None = None) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(str(path), stages)


def test_names_are_read_as_names() -> None:
    assert load_recipe("w4s50g16") == parse_recipe("w4s50g16")
    assert load_recipe("baseline/rtn-w4g64", ["scales"]).stages == ("scales",)


def test_a_file_of_its_own(tmp_path: Path) -> None:
    assert load(tmp_path, PLAIN) == Recipe("mine", 4, 50, 16)
    text = (
        "# half of the groups\nname: other\nbits: 3\nsparsity_percent: 20\ngroup_size: 32\n"
        "score: wanda\nsolver: rtn\nbalance: row\n"
        "block: {epochs: 4, weight_rate: 5e-4, mask_updates: 2}\nscales: {}\nweights: null\n"
    )
    defaults = parse_recipe("w3s20g32")
    assert load(tmp_path, text) == Recipe(
        "other",
        3,
        20,
        32,
        score="wanda",
        solver="rtn",
        balance="row",
        block=replace(defaults.block or BlockStage(), epochs=4, weight_rate=5e-4, mask_updates=2),
        scales=defaults.scales,
    )


def test_a_base_and_what_differs(tmp_path: Path) -> None:
    base = parse_recipe("w4s50g16")
    assert base.scales is not None
    recipe = load(tmp_path, "base: w4s50g16\ngroup_size: 32\nscales: {epochs: 3}\nweights: ~\n")
    assert recipe == replace(
        base, name="mine", group_size=32, weights=None, scales=replace(base.scales, epochs=3.0)
    )


def test_a_base_may_be_a_baseline(tmp_path: Path) -> None:
    recipe = load(tmp_path, "base: baseline/2of4-w4g128\nscore: wanda\nscales: {}\n")
    assert (recipe.structure, recipe.score, recipe.stages) == ("2:4", "wanda", ("scales",))
    recipe = load(tmp_path, "base: w4s0g128\nstructure: 2:4\nscore: obs\n")  # not the number 124
    assert recipe.structure == "2:4"


def test_stages_can_be_chosen_over_a_file(tmp_path: Path) -> None:
    recipe = load(tmp_path, PLAIN + "block: {epochs: 7}\n", ["block", "scales"])
    assert recipe.block is not None
    assert recipe.block.epochs == 7
    assert recipe.stages == ("block", "scales")
    assert load(tmp_path, PLAIN + "block: {}\n", ["none"]).stages == ()


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("3.1bits", Budget(bits_per_weight=3.1)),
        ("60MB", Budget(bytes=60_000_000)),
        ("{bytes: 1000, bits: [2, 4]}", Budget(bytes=1000, bits=(2, 4))),
        (
            "{bits_per_weight: 3, sparsities: [0, 0.5], most_sparsity: 0.6}",
            Budget(bits_per_weight=3.0, sparsities=(0.0, 0.5), most_sparsity=0.6),
        ),
        ("null", None),
    ],
)
def test_budgets(tmp_path: Path, text: str, budget: Budget | None) -> None:
    assert load(tmp_path, PLAIN + f"budget: {text}\n").budget == budget


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("{bits: 8, group_size: 64}", Head(8, 64)),
        ("{bits: 3}", Head(3, 32)),
        ("{}", Head(4, 32)),
        ("null", None),
    ],
)
def test_heads(tmp_path: Path, text: str, head: Head | None) -> None:
    assert load(tmp_path, PLAIN + f"head: {text}\n").head == head
    assert load(tmp_path, PLAIN).head is None
    assert load(tmp_path, f"base: w4s50g16\nhead: {text}\n").head == head


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a mapping of settings"),
        ("- 1\n", "is not a mapping of settings"),
        ("just words", "is not a mapping of settings"),
        ("bits: 4\n", "lacks the key 'sparsity_percent'; give it, or a base"),
        (PLAIN + "spartsity: 4\n", "unknown key 'spartsity'"),
        (PLAIN + "stucture: group\n", "unknown key 'stucture'; did you mean structure"),
        (PLAIN + "zzz: 1\n", "unknown key 'zzz'; known are name, bits"),
        (PLAIN + "bits: 3\n", "line 4: the key 'bits' stands there twice"),
        (PLAIN + "block: {epochs: 1, epochs: 2}\n", "line 4: the key 'epochs' stands there twice"),
        (PLAIN.replace("4", "4.0"), "bits must be a whole number, not 4.0"),
        (PLAIN.replace("4", '"4"'), "bits must be a whole number, not '4'"),
        (PLAIN.replace("4", "true"), "bits must be a whole number, not True"),
        (PLAIN.replace("4", "[4]"), "bits must be a whole number, not a list"),
        (PLAIN.replace("4", ""), "bits must be a whole number, not None"),
        (PLAIN.replace("4", "0x4"), "bits must be a whole number, not '0x4'"),
        (PLAIN.replace("4", "5"), "bits is 5; it must be one of 2, 3, 4, 8"),
        (PLAIN.replace("4", "9" * 5000), "is not valid YAML: |bits is 9"),
        (PLAIN + "name: 3\n", "name must be a text, not 3"),
        (PLAIN + "balance: off\n", "balance is off; it must be one of"),
        (PLAIN + "block: 3\n", "block must be settings .*, not 3"),
        (PLAIN + "block: [1]\n", "block must be settings .*, not a list"),
        (PLAIN + "block: {epoch: 3}\n", "block has an unknown key 'epoch'; did you mean epochs"),
        (PLAIN + "block: {norm_rate: 3}\n", "block has an unknown key 'norm_rate'"),
        (PLAIN + "block: {epochs: x}\n", "block.epochs must be a number, not 'x'"),
        (PLAIN + "block: {epochs: .nan}\n", "block.epochs must be a number, not '.nan'"),
        (PLAIN + "block: {epochs: 1e999}\n", "block: epochs is inf"),
        (PLAIN + "block: {epochs: 0}\n", "block: epochs is 0.0; it must be a number above 0"),
        (PLAIN + "block: {samples: 2.5}\n", "block.samples must be a whole number"),
        (PLAIN + "weights: {weight_rate: 0}\n", "Recipe mine: .*its weight_rate is above 0"),
        (PLAIN + "budget: 3\n", "budget must be a size"),
        (PLAIN + "budget: 3 loaves\n", "budget: The budget '3 loaves' is neither"),
        (PLAIN + "budget: {}\n", "budget: A budget is either"),
        (PLAIN + "budget: {bytes: 9, bits: 4}\n", "budget.bits must be a list, not 4"),
        (PLAIN + "budget: {bytes: 9, bits: [x]}\n", "budget.bits must be a whole number, not 'x'"),
        (PLAIN + "budget: {byte: 9}\n", "budget has an unknown key 'byte'; did you mean bytes"),
        (PLAIN + "head: 4\n", "head must be settings .* a head that is left as it is, not 4"),
        (PLAIN + "head: {bits: 5}\n", "head: bits is 5; it must be one of 2, 3, 4, 8"),
        (PLAIN + "head: {group_size: 24}\n", "head: group_size is 24; it must be one of"),
        (PLAIN + "head: {bits: '4'}\n", "head.bits must be a whole number, not '4'"),
        (PLAIN + "head: {group: 16}\n", "head has an unknown key 'group'; did you mean group_size"),
        ("base: w4s50\n", "'w4s50' is not a recipe"),
        ("base: 4\n", "base must be a text"),
        ("base: other.yaml\n", "'other.yaml' is not a recipe"),
        ("base: w4s50g16\nbase: w4s30g16\n", "line 2: the key 'base'"),
        ("base: w4s50g16\nstructure: 2:4\n", "2:4 drops half of the weights by itself"),
        ("a: &x 1\nb: *x\n", "line 1: anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1: tags are not allowed"),
        ("a: !!int x\n", "line 1: tags are not allowed"),
        ("? [1]\n: 2\n", "line 1: a key is not a word"),
        ("bits: 4\n---\nbits: 3\n", "line 2: but found another document"),
        ("bits: [4\n", "is not valid, line"),
        ("a: b: c\n", "is not valid, line 1"),
        ("a: " + "[" * 60000, "line 1: too many lists"),
        ("a:\n" + "".join(" " * i + "- \n" for i in range(300)), "too many lists"),
        ("bits: \x00\n", "is not valid"),
        (b"bits: \xff\n", "is not UTF-8 text"),
        ("#" * (MAX_BYTES + 1), f"is longer than {MAX_BYTES} bytes"),
    ],
)
def test_refuses(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path, text)
    assert "mine.yaml" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path / "none.YML"):
        with pytest.raises(UsageError, match=f"{re.escape(str(path))} does not exist"):
            load_recipe(str(path))
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("folder.yaml", "pipe.yaml"):
        with pytest.raises(UsageError, match="is not a file"):
            load_recipe(str(tmp_path / name))


def every_recipe() -> list[Recipe]:
    recipes = [parse_recipe(name) for name in preset_names()]
    odd = BlockStage(epochs=1 / 3, weight_rate=1e-5, mask_updates=3)
    budget = Budget(bytes=5, bits=(2, 3), sparsities=(0.1, 0.30000000000000004))
    return [
        *recipes,
        replace(recipes[0], block=odd, balance="model", budget=budget),
        replace(recipes[0], head=Head(8, 64)),
        replace(
            recipes[0], scales=ModelStage(epochs=2), head=None, budget=Budget(bits_per_weight=2.7)
        ),
    ]


@pytest.mark.parametrize("recipe", every_recipe(), ids=lambda recipe: recipe.name)
def test_plain_data_gives_back_the_recipe(recipe: Recipe) -> None:
    plain = recipe_to_dict(recipe)
    assert set(plain) == {field.name for field in fields(recipe)}
    text = json.dumps(plain, allow_nan=False)
    assert recipe_from_dict(json.loads(text)) == recipe
    assert json.dumps(recipe_to_dict(recipe_from_dict(json.loads(text)))) == text


def test_equal_recipes_have_equal_records() -> None:
    whole = replace(parse_recipe("w4s50g16"), block=BlockStage(epochs=2, dense_share=0))
    point = replace(parse_recipe("w4s50g16"), block=BlockStage(epochs=2.0, dense_share=0.0))
    assert json.dumps(recipe_to_dict(whole)) == json.dumps(recipe_to_dict(point))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": None}, "run.json: bits must be a whole number, not None"),
        ({"bits": 7}, "run.json: .*bits is 7"),
        ({"what": 1}, "run.json has an unknown key 'what'"),
        ({"block": {"epochs": 1.0}}, "run.json: block lacks the key 'samples'"),
        ({"block": 1}, "run.json: block must be settings"),
        ({"head": {"bits": 4}}, "run.json: head lacks the key 'group_size'"),
        ({"head": []}, "run.json: head must be settings"),
        ({"budget": {"bytes": -1}}, "run.json: budget: A budget of -1 bytes"),
    ],
)
def test_plain_data_is_checked(change: dict[str, Any], message: str) -> None:
    plain = {**recipe_to_dict(parse_recipe("w4s50g16")), **change}
    with pytest.raises(UsageError, match=message):
        recipe_from_dict(plain, "run.json")


def test_plain_data_is_complete() -> None:
    plain = recipe_to_dict(parse_recipe("w4s50g16"))
    for key in plain:
        with pytest.raises(UsageError, match=f"The recipe lacks the key '{key}'"):
            recipe_from_dict({name: value for name, value in plain.items() if name != key})


def test_the_examples_of_the_documentation_are_recipes(tmp_path: Path) -> None:
    examples = re.findall(r"^```yaml\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) >= 3
    for text in examples:
        load(tmp_path, text)
