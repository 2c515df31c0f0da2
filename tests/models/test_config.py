"""Configurations are read strictly: every field is used, known to be irrelevant, or an error."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from gqsa_compiler.errors import ModelError
from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.models.registry import ARCHITECTURES, architecture, parse_config, text_config

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 320,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

NAN, INFINITY = float("nan"), float("inf")
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 2.0}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def parse(family: str, **fields: Any) -> DecoderConfig:
    base = OPT if family == "opt" else BASE
    return parse_config({**base, "model_type": family, **fields}, "config.json")


@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_what_transformers_writes_is_understood(family: str) -> None:
    config = AutoConfig.for_model(family, num_hidden_layers=2)
    for fields in (config.to_dict(), config.to_diff_dict()):
        parsed = parse_config(fields, "config.json")
        assert parsed.hidden_size == config.hidden_size
        assert parsed.num_hidden_layers == len(parsed.layer_kinds) == 2


@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_defaults_are_those_of_transformers(family: str) -> None:
    fields = {**(OPT if family == "opt" else BASE), "model_type": family}
    mine = parse_config(fields, "config.json")
    theirs = AutoConfig.for_model(**fields)
    assert mine.max_position_embeddings == theirs.max_position_embeddings
    assert mine.tie_word_embeddings == theirs.tie_word_embeddings
    assert mine.norm_eps == getattr(theirs, "rms_norm_eps", 1e-5)
    if family != "opt":
        assert mine.head_dim == (getattr(theirs, "head_dim", None) or 16)
        kinds = {"sliding_attention": "sliding", "full_attention": "full"}
        default = ["sliding_attention" if family == "mistral" else "full_attention"] * 4
        layer_types = getattr(theirs, "layer_types", None) or default
        assert mine.layer_kinds == tuple(kinds[kind] for kind in layer_types)
        assert mine.rope is not None
        rope = theirs.rope_parameters
        assert mine.rope.theta == rope.get("full_attention", rope)["rope_theta"]


@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_unknown_field_is_named(family: str) -> None:
    with pytest.raises(ModelError, match=r"'frobnicate' = 3 is not understood"):
        parse(family, frobnicate=3)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"hidden_size": None}, "'hidden_size' must be an integer, not None"),
        ("llama", {"num_key_value_heads": 3}, "'num_key_value_heads' = 3 does not divide 4"),
        ("llama", {"hidden_size": 66}, "'hidden_size' = 66 is not a multiple of 4"),
        ("llama", {"head_dim": 15}, "'head_dim' = 15 is odd"),
        ("llama", {"num_hidden_layers": 0}, "must be at least 1, not 0"),
        ("llama", {"vocab_size": True}, "'vocab_size' must be an integer, not True"),
        ("llama", {"attention_bias": "yes"}, "'attention_bias' must be true or false"),
        ("llama", {"hidden_act": "mish"}, "'hidden_act' is 'mish'; supported are silu"),
        ("llama", {"hidden_act": 1}, "'hidden_act' must be a string"),
        ("llama", {"rms_norm_eps": "small"}, "'rms_norm_eps' must be a number"),
        ("llama", {"rms_norm_eps": NAN}, "'rms_norm_eps' must be a finite number, not nan"),
        ("llama", {"rms_norm_eps": INFINITY}, "'rms_norm_eps' must be a finite number"),
        ("llama", {"rms_norm_eps": 10**400}, "must be a finite number, not an integer of 1329"),
        ("llama", {"rms_norm_eps": -1}, "'rms_norm_eps' must be at least 0, not -1"),
        ("llama", {"rope_theta": 0}, "'rope_theta' must be more than 1, not 0"),
        ("llama", {"rope_theta": -3.0}, "'rope_theta' must be more than 1, not -3"),
        ("llama", {"rope_parameters": {"rope_theta": NAN}}, "'rope_theta' must be a finite"),
        ("llama", {"rope_scaling": {"type": "ntk"}}, "has rope_type 'ntk'; supported are default"),
        ("llama", {"rope_scaling": {"type": ["yarn"]}}, r"has rope_type \['yarn'\]; supported"),
        ("llama", {"rope_scaling": "yarn"}, "'rope_scaling' must be an object, not 'yarn'"),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 0}}, "'low_freq_factor' must be"),
        ("llama", {"rope_scaling": {**YARN, "factor": INFINITY}}, "'factor' must be a finite"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": -1}}, "'beta_fast' must be at least 0"),
        ("llama", {"rope_scaling": {**YARN, "mscale": -9}}, "'mscale' must be at least 0"),
        ("llama", {"rope_scaling": {**YARN, "attention_factor": 0}}, "must be more than 0"),
        ("llama", {"max_position_embeddings": 0}, "'max_position_embeddings' must be at least 1"),
        ("llama", {"max_position_embeddings": -1}, "must be at least 1, not -1"),
        ("llama", {"max_position_embeddings": None}, "must be an integer, not None"),
        ("llama", {"num_hidden_layers": 1_000_000}, "must be at most 1000, not 1000000"),
        ("opt", {"num_hidden_layers": 1_000_000}, "must be at most 1000, not 1000000"),
        ("llama", {"hidden_size": 10**30}, "'hidden_size' must be at most 2147483647, not 1000"),
        ("llama", {"hidden_size": 10**400}, "must be at most 2147483647, not an integer of 1329"),
        ("llama", {"frob": "x" * 1000}, r"= 'x{199}\.\.\. is not understood"),
        ("llama", {"tie_word_embeddings": "false"}, "must be true or false, not 'false'"),
        ("llama", {"bos_token_id": -1}, "'bos_token_id' must be a token id"),
        ("llama", {"eos_token_id": 10**30}, "'eos_token_id' must be a token id"),
        ("llama", {"eos_token_id": ["x"]}, "'eos_token_id' must be a token id"),
        ("llama", {"rope_interleaved": True}, "'rope_interleaved' is True; only False"),
        ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ("llama", {"is_encoder_decoder": True}, "'is_encoder_decoder' is True; only False"),
        ("llama", {"auto_map": {"AutoModel": "x.py"}}, "'auto_map'"),
        ("llama", {"a": 1, "b": 2}, r"'a' = 1 is not understood \(and 1 more\)"),
        ("qwen2", {"layer_types": ["full_attention"]}, "'layer_types' has 1 entries for 4"),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, "'layer_types' is"),
        ("qwen2", {"layer_types": [["full_attention"]] * 4}, "'layer_types' is"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "no window is in use"),
        ("qwen2", {"use_mrope": True}, "'use_mrope' is True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "must be more than 0, not 0"),
        ("gemma3_text", {"query_pre_attn_scalar": -4}, "must be more than 0, not -4"),
        ("gemma3_text", {"final_logit_softcapping": 0.0}, "must be more than 0, not 0.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "'rope_parameters' must"),
        ("opt", {"word_embed_proj_dim": 32}, "'word_embed_proj_dim' is 32; only 64"),
        ("opt", {"do_layer_norm_before": False}, "'do_layer_norm_before' is False"),
        ("opt", {"_remove_final_layer_norm": True}, "'_remove_final_layer_norm' is True"),
        ("opt", {"layer_norm_elementwise_affine": False}, "'layer_norm_elementwise_affine'"),
        ("opt", {"hidden_size": 66, "word_embed_proj_dim": 66}, "'hidden_size' = 66"),
    ],
)
def test_bad_value_is_named(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse(family, **fields)


def test_missing_field_is_named() -> None:
    with pytest.raises(ModelError, match="lacks 'vocab_size'"):
        parse_config({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}, "c")


def test_unknown_architecture_lists_the_supported_ones() -> None:
    with pytest.raises(ModelError, match=r"says model_type 'mamba'; supported are llama, mistral"):
        architecture("mamba", "config.json")
    with pytest.raises(ModelError, match=r"config\.json has no model_type"):
        architecture(None, "config.json")


def test_windows() -> None:
    assert parse("mistral", sliding_window=None).layer_kinds == ("full",) * 4
    assert parse("mistral", sliding_window=8).layer_kinds == ("sliding",) * 4
    # A window that is not used, as every Qwen2.5 has it.
    unused = parse("qwen2", sliding_window=8, use_sliding_window=False, max_window_layers=2)
    assert unused.sliding_window is None
    assert unused.layer_kinds == ("full",) * 4
    used = parse("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=3)
    assert used.sliding_window == 8
    assert used.layer_kinds == ("full", "full", "full", "sliding")
    gemma = parse("gemma3_text", sliding_window_pattern=2)
    assert gemma.layer_kinds == ("sliding", "full", "sliding", "full")


def test_gemma_scalars() -> None:
    config = parse("gemma3_text", query_pre_attn_scalar=100, final_logit_softcapping=30.0)
    assert config.attention_scale == pytest.approx(0.1)
    assert getattr(config, "final_logit_softcapping") == 30.0  # noqa: B009
    old = parse("gemma3_text", rope_theta=5e5, rope_local_base_freq=2e4,
                rope_scaling={"rope_type": "linear", "factor": 8.0})  # fmt: skip
    assert old.rope is not None
    assert old.rope_local is not None
    assert (old.rope.kind, old.rope.theta, old.rope.factor) == ("linear", 5e5, 8.0)
    assert (old.rope_local.kind, old.rope_local.theta) == ("default", 2e4)


def test_multimodal_gemma_gives_its_text_part() -> None:
    config = text_config(
        {
            "model_type": "gemma3",
            "text_config": {"hidden_size": 64, "num_hidden_layers": 2},
            "vision_config": {"patch_size": 14},
            "eos_token_id": [1, 106],
            "mm_tokens_per_image": 256,
        },
        "config.json",
    )
    assert config["model_type"] == "gemma3_text"
    parsed = parse_config(config, "config.json")
    assert (parsed.hidden_size, parsed.head_dim, parsed.eos_token_ids) == (64, 256, (1, 106))
    with pytest.raises(ModelError, match="says model_type 'gemma3'"):
        text_config({"model_type": "gemma3"}, "config.json")


def test_optional_parts() -> None:
    biased = parse("llama", attention_bias=True, mlp_bias=True)
    assert biased.qkv_bias
    assert biased.output_bias
    assert biased.mlp_bias
    assert not parse("opt", enable_bias=False).qkv_bias
    assert parse("opt", activation_function="gelu").activation == "gelu"
    assert parse("llama", hidden_act="gelu_pytorch_tanh").activation == "gelu_tanh"
    assert parse("llama", bos_token_id=[5, 6], eos_token_id=7).bos_token_id == 5


# Fields as published models have them, where they differ from what transformers writes today.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M-Instruct": {
        "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "num_hidden_layers": 30,
        "vocab_size": 49152, "is_llama_config": True, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "pretraining_tp": 1,
        "torch_dtype": "bfloat16", "transformers.js_config": {"dtype": "q4"},
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64,
        "num_key_value_heads": 8, "intermediate_size": 8192, "num_hidden_layers": 16,
        "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "eos_token_id": [128001, 128008, 128009], "tie_word_embeddings": True,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "num_hidden_layers": 32,
        "vocab_size": 32000, "sliding_window": 4096, "max_position_embeddings": 32768,
    },
    "Qwen2.5-7B-Instruct with YaRN": {
        "model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "num_hidden_layers": 28,
        "vocab_size": 152064, "sliding_window": 131072, "use_sliding_window": False,
        "max_window_layers": 28, "use_mrope": False, "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768,
                         "type": "yarn"},
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128,
        "num_key_value_heads": 8, "intermediate_size": 3072, "num_hidden_layers": 28,
        "vocab_size": 151936, "sliding_window": None, "use_sliding_window": False,
        "max_window_layers": 28, "rope_scaling": None, "attention_bias": False,
    },
    "gemma-3-1b-it": {
        "model_type": "gemma3_text", "hidden_size": 1152, "num_attention_heads": 4,
        "head_dim": 256, "num_key_value_heads": 1, "intermediate_size": 6912,
        "num_hidden_layers": 26, "vocab_size": 262144, "sliding_window": 512,
        "sliding_window_pattern": 6, "cache_implementation": "hybrid",
        "rope_local_base_freq": 10000, "rope_theta": 1000000, "rope_scaling": None,
        "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "query_pre_attn_scalar": 256, "eos_token_id": [1, 106],
    },
    "opt-125m": {
        "model_type": "opt", "hidden_size": 768, "num_attention_heads": 12, "ffn_dim": 3072,
        "num_hidden_layers": 12, "vocab_size": 50272, "prefix": "</s>", "dropout": 0.1,
        "activation_dropout": 0.0, "layerdrop": 0.0, "word_embed_proj_dim": 768,
        "do_layer_norm_before": True, "_remove_final_layer_norm": False, "init_std": 0.02,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models_are_understood(name: str) -> None:
    fields = PUBLISHED[name]
    config = parse_config(fields, name)
    assert len(config.layer_kinds) == fields["num_hidden_layers"]
    full = {"gemma-3-1b-it": 4, "Mistral-7B-v0.1": 0}.get(name, fields["num_hidden_layers"])
    assert config.layer_kinds.count("full") == full
