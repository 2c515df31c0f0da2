"""`quantization_config`: strict reading, exact writing."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from gqsa_compiler.checkpoint import LayerScheme, QuantizationConfig
from gqsa_compiler.errors import CheckpointError

GOOD: dict[str, Any] = {
    "quant_method": "gqsa",
    "format_version": 1,
    "bits": 4,
    "group_size": 16,
    "symmetric": False,
    "sparsity": {"structure": "group", "ratio": 0.5, "balance": "matrix"},
    "ignore": ["lm_head"],
    "producer": "gqsa-compiler 0.1.0",
    "per_layer": {"a.b": {"group_size": 32, "ratio": 0.25}},
}


def spoiled(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return GOOD with one field changed, or removed where `value` is ..."""
    spoilt = copy.deepcopy(GOOD)
    at = spoilt
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return spoilt


def test_reads_the_outline_of_the_design() -> None:
    config = QuantizationConfig.from_dict(GOOD)
    assert config.scheme("x") == LayerScheme(4, 16, False, 0.5)
    assert config.scheme("a.b") == LayerScheme(4, 32, False, 0.25)
    assert config.ignore == ("lm_head",)
    assert config.balance == "matrix"
    assert config.producer == "gqsa-compiler 0.1.0"


@pytest.mark.parametrize("balance", ["matrix", "row", "model"])
def test_every_balance_is_kept(balance: str) -> None:
    config = QuantizationConfig.from_dict(spoiled(("sparsity", "balance"), balance))
    assert config.balance == balance
    assert config.to_dict()["sparsity"]["balance"] == balance


def test_a_layer_may_have_bits_of_its_own() -> None:
    config = QuantizationConfig.from_dict(spoiled(("per_layer", "a.b", "bits"), 8))
    assert config.scheme("a.b") == LayerScheme(8, 32, False, 0.25)
    assert QuantizationConfig.from_dict(config.to_dict()) == config


def test_round_trips_through_json() -> None:
    config = QuantizationConfig.from_dict(GOOD)
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    plain = QuantizationConfig(producer="p")
    assert "per_layer" not in plain.to_dict()
    assert QuantizationConfig.from_dict(plain.to_dict()) == plain


def test_can_be_copied_by_dataclasses() -> None:
    config = QuantizationConfig.from_dict(GOOD)
    assert dataclasses.asdict(config)["per_layer"]["a.b"]["group_size"] == 32
    assert copy.deepcopy(config) == config


def test_ignore_and_per_layer_may_be_absent() -> None:
    value = spoiled(("ignore",), ...)
    del value["per_layer"]
    config = QuantizationConfig.from_dict(value)
    assert (config.ignore, config.per_layer) == ((), {})


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("quant_method",), "gptq", "quant_method 'gptq'"),
        (("quant_method",), ..., "not a GQSA checkpoint"),
        (("format_version",), 2, "format_version 2"),
        (("format_version",), True, "format_version True"),
        (("format_version",), ..., "format_version None"),
        (("bits",), ..., "lacks 'bits'"),
        (("bits",), 5, "bits 5; it must be one of 2, 3, 4, 8"),
        (("bits",), True, "bits True"),
        (("bits",), 4.0, "bits 4.0"),
        (("bits",), [4], "bits"),
        (("group_size",), 24, "group_size 24"),
        (("group_size",), 512, "group_size 512"),
        (("group_size",), True, "group_size True"),
        (("symmetric",), 0, "symmetric 0"),
        (("sparsity",), ..., "lacks 'sparsity'"),
        (("sparsity",), 0.5, "sparsity is not a JSON object"),
        (("sparsity", "ratio"), ..., "lacks 'ratio'"),
        (("sparsity", "ratio"), 1.0, "ratio 1.0"),
        (("sparsity", "ratio"), -0.1, "ratio -0.1"),
        (("sparsity", "ratio"), float("nan"), "ratio nan"),
        (("sparsity", "ratio"), "0.5", "ratio '0.5'"),
        (("sparsity", "structure"), "2:4", "structure '2:4'"),
        (("sparsity", "balance"), "column", "balance 'column'.*matrix, row, model"),
        (("sparsity", "balance"), ["row"], "balance"),
        (("sparsity", "more"), 1, "unknown field 'more'"),
        (("ignore",), "lm_head", "ignore is not a list"),
        (("ignore",), [1], "ignore is not a list"),
        (("ignore",), ["a.b"], "'a.b' in ignore and in per_layer"),
        (("producer",), ..., "lacks 'producer'"),
        (("producer",), 1, "producer is not text"),
        (("activation_bits",), 8, "unknown field 'activation_bits'"),
        (("per_layer",), ["a"], "per_layer is not a JSON object"),
        (("per_layer", "a.b"), 16, "per_layer 'a.b' is not an object"),
        (("per_layer", "a.b", "groups"), 16, "unknown field 'groups'"),
        (("per_layer", "a.b", "group_size"), 7, "per_layer 'a.b'.*group_size 7"),
        (("per_layer", "a.b", "bits"), 6, "per_layer 'a.b'.*bits 6"),
    ],
)
def test_refuses(path: tuple[str, ...], value: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        QuantizationConfig.from_dict(spoiled(path, value))


def test_refuses_what_is_no_object() -> None:
    with pytest.raises(CheckpointError, match="not a JSON object"):
        QuantizationConfig.from_dict([])
