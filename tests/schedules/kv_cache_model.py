"""A numpy model of the paged KV cache, and a Relax module that runs nothing but the real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from gqsa_compiler._tvm import Target, nn, relax, tvm
from gqsa_compiler.schedules.kv_cache import KVCacheSpec, attach_kv_cache
from gqsa_compiler.targets import TargetSpec, parse_target

Array = npt.NDArray[np.float32]


def target_of(lanes: int) -> TargetSpec:
    """Return a target with vectors of `lanes` floats that this machine runs, or skip the test."""
    host = parse_target("cpu")
    if host.vector_bits < lanes * 32:
        pytest.skip(f"this machine has no vectors of {lanes} floats")
    if host.vector_bits == lanes * 32:
        return host
    if lanes == 8:
        return parse_target("x86-64-v3")
    return TargetSpec("sse", "llvm", "x86_64", "x86-64-v2", (), "x86_64-linux-gnu")


def attention_module(spec: KVCacheSpec) -> Any:
    """Return ``run(qkv [n, heads, D], cache) -> [layers, n, Hq, D]``: every layer's attention."""

    class Model(nn.Module):
        def run(self, qkv: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
            n, heads, dim = qkv.shape
            scale = spec.head_dim**-0.5
            qkv = nn.op.reshape(qkv, (1, n, heads, dim))
            rows = [
                nn.op.reshape(
                    kv.attention_with_fused_qkv(layer, qkv, spec.num_attention_heads, scale),
                    (1, n, spec.num_attention_heads, dim),
                )
                for layer in range(spec.num_layers)
            ]
            return nn.op.concat(rows, dim=0)

    heads = spec.num_attention_heads + 2 * spec.num_key_value_heads
    mod, _ = Model().export_tvm(
        {
            "run": {
                "qkv": nn.spec.Tensor(["n", heads, spec.head_dim], "float32"),
                "kv": nn.spec.Object(object_type=PagedKVCache),
                "$": {"param_mode": "none", "effect_mode": "none"},
            }
        }
    )
    return mod


@cache
def machine(spec: KVCacheSpec, lanes: int) -> Any:
    """Compile `attention_module` with the cache attached; once for each case."""
    target = target_of(lanes)
    mod = attach_kv_cache(attention_module(spec), spec, target)
    built = tvm.compile(mod, Target(target.tvm_dict()))
    return relax.VirtualMachine(built, tvm.cpu())


def attention(
    spec: KVCacheSpec, tokens: Array, new: int, window: int | None
) -> npt.NDArray[np.float64]:
    """Return softmax attention of the last `new` of `tokens` [len, heads, D] over all of them."""
    queries, keys = spec.num_attention_heads, spec.num_key_value_heads
    q = tokens[len(tokens) - new :, :queries].astype(np.float64)
    k, v = (
        np.repeat(part, queries // keys, axis=1).astype(np.float64)
        for part in (tokens[:, queries : queries + keys], tokens[:, queries + keys :])
    )
    scores = np.einsum("ihd,jhd->hij", q, k) * spec.head_dim**-0.5
    i = np.arange(len(tokens) - new, len(tokens))[:, None]
    j = np.arange(len(tokens))[None]
    seen = (j <= i) if window is None else (j <= i) & (i - window < j)
    scores[:, ~seen] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", weights, v)


def rounded(spec: KVCacheSpec, tokens: Array) -> Array:
    """Return tokens [n, heads, D] as a cache sees them: its keys and values rounded."""
    if spec.dtype == "float32":
        return tokens
    limit = np.finfo(np.float16).max
    keys_and_values = tokens[:, spec.num_attention_heads :].clip(-limit, limit)
    return np.concatenate(
        [
            tokens[:, : spec.num_attention_heads],
            keys_and_values.astype(np.float16).astype(np.float32),
        ],
        axis=1,
    )


@dataclass
class Pair:
    """The real cache and, beside it, what it should hold."""

    spec: KVCacheSpec
    vm: Any
    max_batch: int = 4
    max_tokens: int = 1024
    chunk: int = 96
    scale: float = 1.0
    sequences: dict[int, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(0)
        shape = tvm.runtime.ShapeTuple([self.max_batch, self.max_tokens, self.chunk])
        self.cache = self.vm["create_kv_cache"](shape)

    def call(self, name: str, *args: Any) -> Any:
        """Call a ``vm.builtin`` function on the cache."""
        return tvm.get_global_func(f"vm.builtin.{name}")(self.cache, *args)

    def add(self, number: int) -> None:
        """Start a sequence."""
        heads = self.spec.num_attention_heads + 2 * self.spec.num_key_value_heads
        self.call("kv_state_add_sequence", number)
        self.sequences[number] = np.zeros((0, heads, self.spec.head_dim), np.float32)

    def remove(self, number: int) -> None:
        """Drop a sequence."""
        self.call("kv_state_remove_sequence", number)
        del self.sequences[number]

    def fork(self, parent: int, child: int, position: int) -> None:
        """Start a sequence with the first tokens of another one."""
        self.call("kv_state_fork_sequence", parent, child, position)
        self.sequences[child] = self.sequences[parent][:position]

    def pop(self, number: int, count: int) -> None:
        """Forget a sequence's last tokens."""
        self.call("kv_state_popn", number, count)
        self.sequences[number] = self.sequences[number][: len(self.sequences[number]) - count]

    def forward(self, numbers: Sequence[int], lengths: Sequence[int]) -> float:
        """Append new tokens to some sequences; return the largest error of any layer's output."""
        heads, dim = self.sequences[numbers[0]].shape[1:]
        new = [
            (self.rng.standard_normal((n, heads, dim)) * self.scale).astype(np.float32)
            for n in lengths
        ]
        shape = tvm.runtime.ShapeTuple
        self.call("kv_state_begin_forward", shape(list(numbers)), shape(list(lengths)))
        out = self.vm["run"](tvm.runtime.tensor(np.concatenate(new)), self.cache).numpy()
        self.call("kv_state_end_forward")
        error, start = 0.0, 0
        for number, rows in zip(numbers, new, strict=True):
            kept = rounded(self.spec, rows)
            tokens = self.sequences[number] = np.concatenate([self.sequences[number], kept])
            for layer, kind in enumerate(self.spec.attn_kinds):
                window = self.spec.sliding_window if kind == "mha_sliding" else None
                want = attention(self.spec, tokens, len(rows), window)
                got = out[layer, start : start + len(rows)]
                error = float(np.maximum(error, np.abs(got - want).max(initial=0)))  # keeps NaN
            start += len(rows)
        return error
