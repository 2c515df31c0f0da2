"""What a caller may ask for: recipes and calibration, by the command line and the Python API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gqsa_compiler.compress import CalibrationSpec, parse_recipe
from gqsa_compiler.compress.calibration import calibration_tokens
from gqsa_compiler.compress.fingerprint import run_settings
from gqsa_compiler.compress.recipes.budget import Budget
from gqsa_compiler.compress.request import choose_calibration, choose_recipe
from gqsa_compiler.errors import UsageError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.source import ModelSource
from tests.tiny_models import make_tiny

RECIPE = parse_recipe("w4s50g16")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    path = make_tiny("llama", tmp_path_factory.mktemp("tiny") / "m", num_hidden_layers=1)
    return resolve(str(path))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path


def test_stages_as_a_text_and_as_a_list() -> None:
    assert choose_recipe("w4s50g16") == RECIPE
    assert choose_recipe("w4s50g16", stages="none").stages == ()
    assert choose_recipe(RECIPE, stages=["none"]) == RECIPE.one_shot()
    assert choose_recipe(RECIPE, stages="block, scales").stages == ("block", "scales")
    assert choose_recipe(RECIPE, stages=[]).stages == ()


def test_budget_and_balance() -> None:
    chosen = choose_recipe(RECIPE, budget="3.1", balance="row")
    assert chosen.budget == Budget(bits_per_weight=3.1)
    assert chosen.balance == "row"
    # A size keeps what else the recipe's budget says.
    some = Budget(bytes=1000, group_sizes=(16, 32), most_sparsity=0.5)
    chosen = choose_recipe(choose_recipe(RECIPE, budget=some), budget="2.5bits")
    assert chosen.budget == Budget(bits_per_weight=2.5, group_sizes=(16, 32), most_sparsity=0.5)
    with pytest.raises(UsageError, match="balance is column"):
        choose_recipe(RECIPE, balance="column")


def test_a_recipe_file_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: w4s30g16\n")
    assert choose_recipe(path, stages="none") == choose_recipe(str(path)).one_shot()


def test_numbers_suit_the_recipe_and_the_model(source: ModelSource) -> None:
    spec = choose_calibration(source, RECIPE, seed=3)
    assert (spec.source, spec.samples, spec.seed) == ("sampled", 768, 3)
    assert spec.sequence_length == 256  # the model's longest; 512 would suit training
    assert spec.describe_samples() == "768"
    spec = choose_calibration(source, RECIPE.one_shot())
    assert (spec.samples, spec.sequence_length) == (128, 128)
    spec = choose_calibration(source, RECIPE, samples=3, sequence_length=9)
    assert (spec.samples, spec.sequence_length) == (3, 9)


def test_texts(source: ModelSource, text: Path) -> None:
    one = choose_calibration(source, RECIPE, text)
    assert one == choose_calibration(source, RECIPE, str(text))
    assert one == choose_calibration(source, RECIPE, [text])
    assert one.paths == (text,)
    assert one.describe_samples() == "up to 768"
    every = choose_calibration(source, RECIPE, text, samples="all", sequence_length=16)
    assert every.samples is None
    assert every.describe_samples() == "all"


def test_a_text_that_is_shorter_than_the_default(source: ModelSource, text: Path) -> None:
    every = choose_calibration(source, RECIPE, text, samples="all", sequence_length=32)
    usual = choose_calibration(source, RECIPE, text, sequence_length=32)
    tokens = calibration_tokens(usual, source, 1)
    assert 1 < len(tokens) < 768
    assert torch.equal(tokens, calibration_tokens(every, source, 1))
    asked = choose_calibration(source, RECIPE, text, samples=256, sequence_length=32)
    with pytest.raises(UsageError, match=f"--samples {len(tokens)}"):
        calibration_tokens(asked, source, 1)
    text.write_text("The quick brown fox.")
    with pytest.raises(UsageError, match="fewer than one sequence of 32"):
        calibration_tokens(usual, source, 1)
    # Work with a number that was asked for is not work with whatever there is.
    assert asked.to_dict() != usual.to_dict()


def test_a_spec_has_its_own_numbers(source: ModelSource) -> None:
    spec = CalibrationSpec(samples=2, sequence_length=8, seed=7)
    assert choose_calibration(source, RECIPE, spec, seed=1) is spec
    with pytest.raises(UsageError, match="given twice"):
        choose_calibration(source, RECIPE, spec, samples=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "at least 1 sample"),
        ({"samples": "all"}, "no whole to take"),
        ({"sequence_length": 1}, "at least 2 tokens"),
        ({"sequence_length": 257}, "takes at most 256 tokens"),
        ({"calibration": CalibrationSpec(sequence_length=999)}, "takes at most 256 tokens"),
        ({"calibration": "none.txt"}, "does not exist"),
    ],
)
def test_what_cannot_be_had(source: ModelSource, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_calibration(source, RECIPE, **arguments)


def test_the_settings_know_the_files(source: ModelSource, text: Path) -> None:
    steps: list[tuple[int, int]] = []
    spec = choose_calibration(source, RECIPE, text)
    settings = run_settings(
        source, {}, spec, lambda stage, done, total: steps.append((done, total)), seed=1
    )
    names = {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(settings["files"]) == names
    assert list(settings["texts"]) == [str(text)]
    assert settings["seed"] == 1
    assert steps
    again = run_settings(source, {}, spec, lambda *_: None, seed=1)
    assert again == settings
