"""Tiny models with random weights, one of every supported family, for tests of all packages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "opt")

VOCAB_SIZE = 320
EOS_TOKEN_ID = 2
"""``<|im_end|>``; generation_config.json also ends at ``<|endoftext|>``, which is 0."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SHARED: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 0,
}

_FAMILY: Mapping[str, Mapping[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rope_theta": 10000.0},
    "mistral": {"sliding_window": 12, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 32},
    "gemma3": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}

_TRAINING_TEXT = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. "
    "In the beginning there was the word, and the words were many; the model reads them all. "
    "def main(argument): return argument + 1  # numbers 0 1 2 3 4 5 6 7 8 9 10 100 1000\n"
)


def make_tiny(
    family: str, directory: Path, *, seed: int = 0, gain: float = 1.5, **overrides: Any
) -> Path:
    """Write a tiny model as transformers would save it.

    Parameters
    ----------
    family : str
        One of `FAMILIES`.
    directory : Path
        Created; gets config.json, model.safetensors (float32, or `dtype`), a byte-level BPE
        tokenizer of `VOCAB_SIZE` tokens with a ChatML template, and generation_config.json.
    seed : int
        Of the weights.
    gain : float
        Ratio of the sizes of a matrix's outputs and inputs: 1 is the usual initialisation, more
        makes errors grow from layer to layer.
    **overrides : Any
        Configuration fields that replace the tiny defaults; also ``dtype`` (e.g. ``"float16"``).

    Returns
    -------
    Path
        `directory`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, str(overrides.pop("dtype", "float32")))
    fields = {**_SHARED, **_FAMILY[family], **overrides}
    if family == "opt":
        for name in ("intermediate_size", "num_key_value_heads"):
            fields.pop(name)
    model_type = "gemma3_text" if family == "gemma3" else family
    config = AutoConfig.for_model(model_type, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases vary too, or a test would not see them mixed up or left out.
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:
                    parameter.normal_(std=gain * parameter.shape[1] ** -0.5)
            model.get_input_embeddings().weight.normal_(std=0.5)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(directory)
    save_tiny_tokenizer(directory)
    return directory


def save_tiny_tokenizer(directory: Path) -> None:
    """Write a real tokenizer of exactly `VOCAB_SIZE` tokens, its template and its settings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TRAINING_TEXT], trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise AssertionError(f"The tiny tokenizer has {tokenizer.get_vocab_size()} tokens.")
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    _write_json(directory / "tokenizer_config.json", settings)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": [0, EOS_TOKEN_ID], "pad_token_id": 0}
    _write_json(directory / "generation_config.json", generation)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
