"""Run an imported module as it is: TVM's default pipeline and TVM's own paged KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.relax.frontend.nn.llm.kv_cache import RopeMode, TIRPagedKVCache

from gqsa_compiler._tvm import Target, relax, tvm, tvm_ffi
from gqsa_compiler.frontends.hf import ImportedModel
from gqsa_compiler.targets import parse_target

PAGE_SIZE = 16
MAX_TOKENS = 128


def add_kv_cache(imported: ImportedModel, target: Any) -> Any:
    """Return the module with a function ``create_kv_cache`` for one sequence."""
    model = imported.model
    builder = relax.BlockBuilder(imported.mod)
    sliding = "mha_sliding" in model.attn_kinds
    with builder.function("create_kv_cache", []):
        cache = TIRPagedKVCache(
            attn_kind=list(model.attn_kinds),
            max_batch_size=1,
            max_total_seq_len=MAX_TOKENS,
            prefill_chunk_size=MAX_TOKENS,
            page_size=PAGE_SIZE,
            support_sliding_window=0,
            layer_partition=relax.ShapeExpr([0, model.num_layers]),
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            qk_head_dim=model.head_dim,
            v_head_dim=model.head_dim,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=RopeMode.NONE,
            rope_scale=1,
            rope_theta=10000,
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=model.head_dim,
            enable_disaggregation=False,
            dtype="float32",
            target=target,
            **({"layer_sliding_window_size": model.sliding_window} if sliding else {}),
        )
        builder.emit_func_output(cache._expr)
    return builder.finalize()


class Runner:
    """A compiled tiny model and one set of parameters.

    Parameters
    ----------
    imported : ImportedModel
    """

    def __init__(self, imported: ImportedModel) -> None:
        target = Target(parse_target("cpu").tvm_dict())
        with target:
            executable = tvm.compile(add_kv_cache(imported, target), target)
        self._vm = relax.VirtualMachine(executable, tvm.cpu())
        self._device = tvm.cpu()
        self.use(imported)

    def use(self, imported: ImportedModel) -> None:
        """Take other parameters of the same shapes."""
        self.params = [
            self._tensor(np.asarray(imported.load(name), dtype=np.float32))
            for name in imported.params
        ]

    def _tensor(self, array: npt.NDArray[Any]) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), self._device)

    def new_cache(self) -> Any:
        """Create a cache that holds the empty sequence 0."""
        cache = self._vm["create_kv_cache"]()
        tvm_ffi.get_global_func("vm.builtin.kv_state_add_sequence")(cache, 0)
        return cache

    def _step(self, function: str, cache: Any, tokens: Sequence[int], *inputs: Any) -> Any:
        shape = tvm_ffi.Shape
        begin = tvm_ffi.get_global_func("vm.builtin.kv_state_begin_forward")
        begin(cache, shape([0]), shape([len(tokens)]))
        ids = self._tensor(np.asarray(tokens, np.int32))
        out = self._vm[function](ids, *inputs, cache, *self.params)
        tvm_ffi.get_global_func("vm.builtin.kv_state_end_forward")(cache)
        return out

    def forward(
        self, cache: Any, tokens: Sequence[int], rows: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """Append tokens and return the logits [m, V] of `rows` among them."""
        chosen = self._tensor(np.asarray(rows, np.int32))
        return np.asarray(self._step("forward", cache, tokens, chosen).numpy())

    def all_logits(self, cache: Any, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens and return the logits [n, V] of all, by ``hidden_states``, ``logits``."""
        hidden = self._step("hidden_states", cache, tokens)
        return np.asarray(self._vm["logits"](hidden, *self.params).numpy())


def reference_logits(source_config: Mapping[str, Any], path: Any, tokens: Sequence[int]) -> Any:
    """Return transformers' float32 logits [n, V] of a sequence."""
    import torch
    from transformers import AutoModelForCausalLM

    del source_config
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].numpy()
