"""Rotary tables agree with transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gqsa_compiler.errors import ModelError
from gqsa_compiler.models.registry import parse_config
from gqsa_compiler.models.rope import RopeParameters

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
POSITIONS = 300

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.75,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn mscale": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
    },
}


def halves(cos: torch.Tensor, sin: torch.Tensor) -> np.ndarray:
    """Return transformers' cos and sin, whose two halves repeat, as our table."""
    half = cos.shape[-1] // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1).numpy()


def expected(scaling: dict[str, Any]) -> np.ndarray:
    config = AutoConfig.for_model(**BASE, rope_parameters={"rope_theta": 5e4, **scaling})
    positions = torch.arange(POSITIONS)[None]
    return halves(*LlamaRotaryEmbedding(config)(torch.zeros(1), positions))


def mine(**fields: Any) -> RopeParameters:
    rope = parse_config({**BASE, **fields}, "config.json").rope
    assert rope is not None
    return rope


@pytest.mark.parametrize("name", list(SCALINGS))
def test_table_in_both_spellings(name: str) -> None:
    scaling = SCALINGS[name]
    new = mine(rope_parameters={"rope_theta": 5e4, **scaling})
    old = mine(rope_theta=5e4, rope_scaling=scaling)
    assert new == old
    table = new.table(POSITIONS, 64)
    assert table.dtype == np.float32
    assert table.shape == (POSITIONS, 64)
    # transformers computes angles in float32: at position 300 they are off by some 1e-5.
    np.testing.assert_allclose(table, expected(scaling), atol=5e-5)


def test_type_is_an_old_name_of_rope_type() -> None:
    assert mine(rope_scaling={"type": "linear", "factor": 2.0}).kind == "linear"


def test_yarn_without_factor_takes_the_ratio_of_the_contexts() -> None:
    assert mine(rope_scaling={"type": "yarn", "original_max_position_embeddings": 128}).factor == 4


def test_gemma_has_a_table_for_each_kind_of_layer() -> None:
    fields = {
        **BASE,
        "model_type": "gemma3_text",
        "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    config = parse_config(fields, "config.json")
    reference = Gemma3RotaryEmbedding(AutoConfig.for_model(**fields))
    positions = torch.arange(POSITIONS)[None]
    for kind, rope in (("full_attention", config.rope), ("sliding_attention", config.rope_local)):
        assert rope is not None
        want = halves(*reference(torch.zeros(1), positions, kind))
        np.testing.assert_allclose(rope.table(POSITIONS, 32), want, atol=5e-5)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic'; supported are default"),
        ({"rope_type": "longrope"}, "rope_type 'longrope'"),
        ({"rope_type": "linear"}, "lacks 'factor'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor 0.5; it must be at least 1"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1}, "has 'beta_fast', which is not"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "only a part of each head"),
        (
            {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 128},
            "lacks 'low_freq_factor'",
        ),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4},
            "rope_scaling configuration lacks 'original_max_position_embeddings'",
        ),
        (
            {**SCALINGS["llama3"], "low_freq_factor": 4, "high_freq_factor": 4},
            "not above low_freq_factor",
        ),
        ({"rope_type": "yarn", "factor": "big"}, "'factor' must be a number"),
        ([1], "'rope_scaling' must be an object"),
    ],
)
def test_bad_scaling_is_named(scaling: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        mine(rope_scaling=scaling)


DISAGREE = "'rope_scaling' says something else than 'rope_parameters'"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": SCALINGS["linear"]},
            DISAGREE,
        ),
        (
            {"rope_parameters": SCALINGS["yarn"], "rope_scaling": {"type": "default"}},
            DISAGREE,
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
            "'rope_theta' = 10000.0 differs from the 500000.0 of 'rope_parameters'",
        ),
    ],
)
def test_two_spellings_that_disagree_are_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        mine(**fields)


def test_two_spellings_that_agree_are_fine() -> None:
    scaling = SCALINGS["linear"]
    both = mine(
        rope_theta=5e4,
        rope_scaling=scaling,
        rope_parameters={"rope_theta": 5e4, "partial_rotary_factor": 1.0, **scaling},
    )
    assert both == mine(rope_theta=5e4, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {
                "rope_scaling": SCALINGS["linear"],
                "rope_parameters": {"full_attention": {"rope_type": "default"}},
            },
            DISAGREE,
        ),
        (
            {
                "rope_local_base_freq": 2e4,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}
                },
            },
            "'rope_local_base_freq' = 20000.0 differs from the 10000.0 of 'rope_parameters'",
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "linear"}}},
            "rope_parameters configuration lacks 'factor'",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling configuration lacks 'factor'"),
        (
            {
                "rope_scaling": SCALINGS["linear"],
                "rope_parameters": {"full_attention": {"rope_type": "linear"}},
            },
            "rope_parameters configuration lacks 'factor'",
        ),
    ],
)
def test_gemma_blames_the_field_that_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        mine(model_type="gemma3_text", **fields)


def test_gemma_in_two_spellings_that_agree() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old: dict[str, Any] = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling}
    new = {
        "full_attention": {"rope_theta": 1e6, **scaling},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    assert mine(model_type="gemma3_text", **old, rope_parameters=new).factor == 8.0
