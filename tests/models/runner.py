"""Run an imported module as it is: TVM's default pipeline, without this project's passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler._tvm import Target, relax, tvm, tvm_ffi
from gqsa_compiler.frontends.hf import ImportedModel
from gqsa_compiler.schedules.kv_cache import KVCacheSpec, attach_kv_cache
from gqsa_compiler.targets import parse_target

MAX_TOKENS = 128


class Runner:
    """A compiled tiny model and one set of parameters.

    Parameters
    ----------
    imported : ImportedModel
    """

    def __init__(self, imported: ImportedModel) -> None:
        model = imported.model
        spec = KVCacheSpec(
            num_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            attn_kinds=model.attn_kinds,
            sliding_window=model.sliding_window,
        )
        cpu = parse_target("cpu")
        target = Target(cpu.tvm_dict())
        executable = tvm.compile(attach_kv_cache(imported.mod, spec, cpu), target)
        self._device = tvm.cpu()
        self._vm = relax.VirtualMachine(executable, self._device)
        self.use(imported)

    def use(self, imported: ImportedModel) -> None:
        """Take the parameters of a model whose module is the same."""
        self._params = [
            self._tensor(np.asarray(imported.load(name), dtype=np.float32))
            for name in imported.params
        ]

    def _tensor(self, array: npt.NDArray[Any]) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), self._device)

    def new_cache(self) -> Any:
        """Create a cache that holds the empty sequence 0."""
        cache = self._vm["create_kv_cache"](tvm_ffi.Shape([1, MAX_TOKENS, MAX_TOKENS]))
        tvm_ffi.get_global_func("vm.builtin.kv_state_add_sequence")(cache, 0)
        return cache

    def _step(self, function: str, cache: Any, tokens: Sequence[int], *inputs: Any) -> Any:
        begin = tvm_ffi.get_global_func("vm.builtin.kv_state_begin_forward")
        begin(cache, tvm_ffi.Shape([0]), tvm_ffi.Shape([len(tokens)]))
        ids = self._tensor(np.asarray(tokens, np.int32))
        out = self._vm[function](ids, *inputs, cache, *self._params)
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
        return np.asarray(self._vm["logits"](hidden, *self._params).numpy())


def reference_logits(path: Path, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return transformers' float32 logits [n, V] of a sequence."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return np.asarray(model(torch.tensor([list(tokens)])).logits[0].numpy())
