"""Budgets: what the command line reads, what is refused, and sizes to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.compress.allocation.stored import stored_bytes, stored_groups
from gqsa_compiler.compress.recipes.budget import Budget, parse_budget
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.compress.solver.importance import choose_mask
from gqsa_compiler.errors import UsageError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("3.1", Budget(bits_per_weight=3.1)),
        ("3.1bits", Budget(bits_per_weight=3.1)),
        (" 4 bits ", Budget(bits_per_weight=4.0)),
        ("60MB", Budget(bytes=60_000_000)),
        ("60 MiB", Budget(bytes=60 << 20)),
        ("1.5GB", Budget(bytes=1_500_000_000)),
        ("0.5GiB", Budget(bytes=1 << 29)),
        ("700kB", Budget(bytes=700_000)),
        ("12345B", Budget(bytes=12345)),
    ],
)
def test_parse(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["3.1", "2.75bits", "60MB", "1.5GiB"])
def test_what_is_shown_is_read_again(text: str) -> None:
    budget = parse_budget(text)
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bits",
        "3,1",
        "-3",
        "+3",
        "3.",
        ".5",
        "1e3",
        "nan",
        "inf",
        "3.1 mb",
        "60Mb",
        "60M",
        "3 4",
    ],
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="neither bits a weight"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0", "0bits", "16.5", "99999999999bits", "0MB", "0.2B"])
def test_impossible_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"A budget of .* cannot be me"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one of the two"),
        ({"bits_per_weight": 3.0, "bytes": 3}, "one of the two"),
        ({"bits_per_weight": float("nan")}, "cannot be meant"),
        ({"bytes": 1.5}, "cannot be met"),
        ({"bits": ()}, "are none"),
        ({"bits": (4, 5)}, "some of 2, 3, 4, 8"),
        ({"bits": (4, 4)}, "each once"),
        ({"bits": (True,)}, "some of"),
        ({"bits": 4}, "bits to choose from are 4; they must be a list"),
        ({"sparsities": 0.5}, "sparsities to choose from are 0.5; they must be a list"),
        ({"group_sizes": (16, 24)}, "group sizes to choose from are 16, 24"),
        ({"least_sparsity": -0.1}, "least sparsity of a layer is -0.1"),
        ({"most_sparsity": 0.96}, "must be 0 to 0.95"),
        ({"most_sparsity": "0.5"}, "must be 0 to 0.95"),
        ({"least_sparsity": 0.5, "most_sparsity": 0.4}, "is above the most"),
        ({"sparsities": (0.5, 1.0)}, "sparsity to choose from is 1.0"),
        ({"sparsities": (0.9,)}, "within its limits 0 to 0.8"),
    ],
)
def test_impossible_choices_are_refused(fields: dict[str, Any], message: str) -> None:
    if fields and not {"bits_per_weight", "bytes"} & set(fields):
        fields = {"bits_per_weight": 3.0, **fields}
    with pytest.raises(UsageError, match=message):
        Budget(**fields)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(bits_per_weight=3.1),
        Budget(bytes=77, bits=(2, 4), group_sizes=(16, 64), sparsities=(0.0, 0.5)),
        Budget(bytes=77, least_sparsity=0.1, most_sparsity=0.6),
    ],
)
def test_json_round_trip(budget: Budget) -> None:
    assert Budget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(UsageError, match="has no 'bit'; it has bits, bits_per_weight, bytes"):
        Budget.from_dict({"bytes": 3, "bit": 4})


def test_sparsities_are_whole_percents_within_the_limits() -> None:
    budget = Budget(bytes=1, least_sparsity=0.105, most_sparsity=0.8)
    allowed = budget.allowed_sparsities
    assert allowed == (0.105, *(percent / 100 for percent in range(11, 81)))
    chosen = Budget(bytes=1, sparsities=(0.75, 0.5, 0.0, 0.95, 0.5)).allowed_sparsities
    assert chosen == (0.0, 0.5, 0.75)


def test_the_recipe_decides_what_the_budget_leaves_out() -> None:
    recipe = LayerTarget(3, 64, 0.5)
    assert Budget(bytes=1).choices(recipe) == ((3,), (64,))
    assert Budget(bytes=1, bits=(2, 4)).choices(recipe) == ((2, 4), (64,))
    assert Budget(bytes=1, group_sizes=(16, 32)).choices(recipe) == ((3,), (16, 32))


def test_most_bytes_round_down() -> None:
    assert Budget(bits_per_weight=3.1).most_bytes(80) == 31
    assert Budget(bits_per_weight=3.1).most_bytes(81) == 31
    assert Budget(bytes=7).most_bytes(81) == 7


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [8, 16, 32])
@pytest.mark.parametrize("balance", ["matrix", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.07, 0.5, 0.95])
def test_bytes_are_those_of_a_layer(
    bits: int, group_size: int, balance: str, sparsity: float
) -> None:
    import torch

    n, k = 13, 96
    target = LayerTarget(bits, group_size, sparsity)
    scores = torch.rand(n, k // group_size, generator=torch.Generator().manual_seed(0))
    keep = choose_mask(scores, sparsity, balance).numpy()
    groups = int(keep.sum())
    layer = BSRLayer(
        name="layer",
        shape=(n, k),
        group_size=group_size,
        indptr=np.zeros(n + 1, np.int32),
        indices=np.zeros(groups, np.uint16),
        qweight=np.zeros((groups, group_size * bits // 8), np.uint8),
        scales=np.zeros(groups, np.float16),
        qzeros=np.zeros((groups * bits + 7) // 8, np.uint8),
        bits=bits,
    )
    assert stored_groups((n, k), target, balance) == groups
    assert stored_bytes((n, k), target, balance) == layer.nbytes


def test_groups_must_divide_the_inputs() -> None:
    with pytest.raises(ValueError, match="groups of 32 do not divide 48"):
        stored_bytes((3, 48), LayerTarget(4, 32, 0.0))


def test_groups_are_counted_as_masks_keep_them() -> None:
    for total in (1, 2, 7, 1000, 123_457):
        for percent in range(96):
            scores = torch.zeros(1, total)
            assert stored_groups((1, 8 * total), LayerTarget(4, 8, percent / 100)) == int(
                choose_mask(scores, percent / 100, "matrix").sum()
            )


def test_sizes_need_no_torch() -> None:
    code = (
        "import sys; import gqsa_compiler.compress.recipes.budget;"
        "import gqsa_compiler.compress.allocation.allocate;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
