"""Write tiny GGUF files from tiny Hugging Face models, the way llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from gqsa_compiler.frontends.resolve import resolve

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAMA_NAMES = {"post_attention_layernorm": "ffn_norm"}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _permute(w: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Reorder rows of q or k from Hugging Face's rotary halves to llama.cpp's pairs."""
    rows = w.shape[0] // heads // 2
    return w.reshape(heads, 2, rows, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(
    model: Path,
    path: Path,
    *,
    quantization: str = "F32",
    fields: Mapping[str, float | int | str] | None = None,
    tensors: Mapping[str, npt.NDArray[Any]] | None = None,
    architecture: str | None = None,
    split: str = "gpt-2",
) -> Path:
    """Convert the tiny model in the directory `model` into the file `path`.

    Parameters
    ----------
    model, path : Path
    quantization : str
        ``F32``, ``F16`` or ``Q8_0``, for matrices.
    fields : dict
        More metadata, without the architecture before each name.
    tensors : dict
        More tensors, as they are.
    architecture : str or None
        Another ``general.architecture``.
    split : str
        ``tokenizer.ggml.pre``.
    """
    source = resolve(str(model))
    config = source.config
    kind = {"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture or kind)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"] if "head_dim" in config else config["hidden_size"] // heads
    rope = config["rope_parameters"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if kind == "llama":
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config["vocab_size"])
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if kind == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    for name, value in (fields or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{kind}.{name}", value)
    _add_tokenizer(writer, model, split)

    for name in source.tensor_names():
        array = source.tensor(name).astype(np.float32)
        if kind == "llama" and ".q_proj." in name:
            array = _permute(array, heads)
        if kind == "llama" and ".k_proj." in name:
            array = _permute(array, kv_heads)
        if kind == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        if array.ndim == 2 and quantization != "F32":
            qtype = gguf.GGMLQuantizationType[quantization]
            writer.add_tensor(_gguf_name(name, kind), gguf.quantize(array, qtype), raw_dtype=qtype)
        else:
            writer.add_tensor(_gguf_name(name, kind), array)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str, kind: str) -> str:
    names = {**_NAMES, **(_GEMMA_NAMES if kind == "gemma3" else _LLAMA_NAMES)}
    base, suffix = name.rsplit(".", 1)
    if base.startswith("model.layers."):
        _, _, block, part = base.split(".", 3)
        return f"blk.{block}.{names[part]}.{suffix}"
    return f"{names[base]}.{suffix}"


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, split: str) -> None:
    parsed = json.loads((model / "tokenizer.json").read_text())["model"]
    tokens = sorted(parsed["vocab"], key=parsed["vocab"].__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in parsed["merges"]]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([control if t.startswith("<|") else normal for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_eot_token_id(0)
    writer.add_chat_template((model / "chat_template.jinja").read_text())
