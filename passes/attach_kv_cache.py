"""Phase 3: the paged KV cache, with this target's attention kernels."""

from __future__ import annotations

from gqsa_compiler._tvm import tvm
from gqsa_compiler.schedules.kv_cache import KVCacheSpec, attach_kv_cache
from gqsa_compiler.targets import TargetSpec


def AttachKVCache(spec: KVCacheSpec | None, target: TargetSpec) -> tvm.transform.Pass:
    """Add `create_kv_cache` and its kernels; nothing for a module without attention (None)."""

    def transform(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        return mod if spec is None else attach_kv_cache(mod, spec, target)

    return tvm.transform.module_pass(transform, opt_level=0, name="AttachKVCache")
