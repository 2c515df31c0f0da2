"""A toy artefact built straight from TVM, so that the runtime is tested without the compiler."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 -- teaches numpy the name bfloat16
import numpy as np
import tokenizers
from tvm.relax.frontend.nn.llm import kv_cache

from gqsa_compiler._tvm import Target, nn, relax, tirx, tvm
from gqsa_compiler.runtime import manifest as mf
from gqsa_compiler.runtime import schema
from gqsa_compiler.runtime.params import write_params
from gqsa_compiler.targets import TargetSpec, parse_target

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 2, 2, 1, 16, 32
CONTEXT, CHUNK, BATCH = 96, 16, 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE over the 256 bytes with a few merges: any text encodes, any ids decode."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("i", "n"), ("e", "r")]
    tokens = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


VOCAB = make_tokenizer().get_vocab_size()


class _Attention(nn.Module):
    def __init__(self) -> None:
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Any, layer: int, kv: Any) -> Any:
        n, _ = x.shape
        qkv = self.qkv(x).reshape(1, n, HEADS + 2 * KV_HEADS, HEAD_DIM)
        out = kv.attention_with_fused_qkv(layer, qkv, HEADS, HEAD_DIM**-0.5)
        return x + self.out(out.reshape(n, HEADS * HEAD_DIM))


class Toy(nn.Module):
    """Embedding, two attention layers, a bfloat16 gain and a head: every function of the ABI."""

    def __init__(self) -> None:
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.gain = nn.Parameter((HIDDEN,), "bfloat16")
        self.layers = nn.ModuleList([_Attention() for _ in range(LAYERS)])
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def hidden_states(self, tokens: Any, kv: Any) -> Any:
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, i, kv)
        return x

    def logits(self, hidden: Any) -> Any:
        return self.head(hidden * self.gain.astype("float32"))

    def forward(self, tokens: Any, rows: Any, kv: Any) -> Any:
        return self.logits(nn.op.take(self.hidden_states(tokens, kv), rows, axis=0))


def _add_kv_cache(mod: Any, target: Any) -> Any:
    batch, total, chunk = (tirx.Var(name, "int64") for name in ("batch", "total", "chunk"))
    sizes = relax.Var("sizes", relax.ShapeType([batch, total, chunk]))
    bb = relax.BlockBuilder(mod)
    with bb.function("create_kv_cache", [sizes]):
        cache = kv_cache.TIRPagedKVCache(
            attn_kind="mha", max_batch_size=batch, max_total_seq_len=total,
            prefill_chunk_size=chunk, page_size=16, support_sliding_window=0,
            layer_partition=relax.ShapeExpr([0, LAYERS]), num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, qk_head_dim=HEAD_DIM,
            v_head_dim=HEAD_DIM, mla_original_qk_head_dim=0, mla_original_v_head_dim=0,
            rope_mode=kv_cache.RopeMode.NONE, rope_scale=1, rope_theta=10000,
            rope_scaling={}, rope_ext_factors=relax.prim_value(0), rotary_dim=HEAD_DIM,
            enable_disaggregation=False, dtype="float32", target=target,
        )  # fmt: skip
        bb.emit_func_output(cache._expr)
    return bb.finalize()


def _build(library: Path, spec: TargetSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    target = Target(spec.tvm_dict())
    packed = {"param_mode": "packed", "effect_mode": "none"}
    tokens = nn.spec.Tensor(["n"], "int32")
    kv = nn.spec.Object(object_type=kv_cache.PagedKVCache)
    rows, hidden = nn.spec.Tensor(["m"], "int32"), nn.spec.Tensor(["m", HIDDEN], "float32")
    with target:
        mod, params = Toy().export_tvm(
            spec={
                "forward": {"tokens": tokens, "rows": rows, "kv": kv, "$": packed},
                "hidden_states": {"tokens": tokens, "kv": kv, "$": packed},
                "logits": {"hidden": hidden, "$": packed},
            }
        )
        mod = _add_kv_cache(mod, target)
        tvm.compile(mod, target, relax_pipeline="default").export_library(str(library))
    return {name: (tuple(map(int, p.shape)), p.dtype) for name, p in params}


def weights(shapes: dict[str, tuple[tuple[int, ...], str]]) -> list[tuple[str, np.ndarray]]:
    """Random weights of sizes that keep the logits' spread near 4: no draw is a foregone one."""
    rng = np.random.default_rng(7)
    scale = {"embed.weight": 1.0, "gain": 1.0, "head.weight": 3 / HIDDEN**0.5}
    return [
        (name, (rng.standard_normal(s) * scale.get(name, s[-1] ** -0.5)).astype(np.dtype(str(d))))
        for name, (s, d) in shapes.items()
    ]


def write_artefact(directory: Path) -> list[tuple[str, np.ndarray]]:
    """Write a whole artefact for this machine; return its weights."""
    directory.mkdir()
    spec = parse_target("cpu")
    arrays = weights(_build(directory / "model.so", spec))
    parameters = write_params(directory / "params.safetensors", arrays)
    digest = hashlib.sha256((directory / "model.so").read_bytes()).hexdigest()
    token_bytes = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
    mf.Manifest(
        producer="tests",
        versions=schema.Versions(version("apache-tvm"), version("apache-tvm-ffi")),
        variants=(schema.Variant(
            schema.Target("cpu", "llvm", spec.arch, spec.required_flags, 1, spec.triple),
            schema.Library("model.so", digest),
        ),),
        model=schema.ModelInfo(
            name="toy", architecture="toy", vocab_size=VOCAB, hidden_size=HIDDEN,
            num_layers=LAYERS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
            context_length=CONTEXT, prefill_chunk=CHUNK, max_batch=BATCH, sliding_window=None,
            bos_token_id=None, eos_token_ids=(0,), activations="float32",
        ),
        kv_cache=schema.KVCacheInfo("float32", 16, token_bytes),
        memory=schema.Memory(sum(a.nbytes for _, a in arrays), token_bytes, 0),
        parameters_file="params.safetensors",
        parameters=parameters,
        kernels=(schema.Kernel("head", "toy", 1, {"tile": 4}, VOCAB, HIDDEN, "float32", None, 0.0,
                           VOCAB * HIDDEN * 4, True),),
        bytes_per_token=sum(a.nbytes for _, a in arrays),
    ).write(directory)  # fmt: skip
    make_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"eos_token": SPECIAL[2], "bos_token": {"content": SPECIAL[1]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return arrays


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an artefact's manifest as a damaged or foreign one would differ."""
    path = directory / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def reference(arrays: list[tuple[str, np.ndarray]], tokens: list[int]) -> np.ndarray:
    """Slow numpy: float64 logits [n, V] after each of the tokens."""
    w = {name: array.astype(np.float64) for name, array in arrays}
    x = w["embed.weight"][tokens]
    n = len(tokens)
    for i in range(LAYERS):
        qkv = (x @ w[f"layers.{i}.qkv.weight"].T).reshape(n, -1, HEAD_DIM)
        q, k, v = qkv[:, :HEADS], qkv[:, HEADS], qkv[:, HEADS + 1]
        scores = np.einsum("ihd,jd->hij", q, k) * HEAD_DIM**-0.5
        scores[:, ~np.tri(n, dtype=bool)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = np.einsum("hij,jd->ihd", p, v).reshape(n, -1)
        x = x + out @ w[f"layers.{i}.out.weight"].T
    return (x * w["gain"]) @ w["head.weight"].T
