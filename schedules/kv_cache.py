"""TVM's paged KV cache with this project's kernels.

The runtime object keeps the pages and sequences and calls nine kernels; here they are put into a
module together with the function that creates the object. What was tried and failed:

- TVM's ``mha_sliding`` layer kind (0.27). The kernel for new keys is not told which layer it
  works for, so a chunk longer than the window comes out wrong (NaN with TVM's own kernels); a
  forked sequence sees a window's worth of keys of every block it is made of; the cache crashes
  when all layers are of that kind. So every layer is ``mha`` to the runtime, nothing is evicted,
  and a layer's window travels in the sign of ``sm_scale``, the one number that reaches every
  kernel from the call.
- RoPE inside the cache knows one theta a model and not Gemma 3's two: RoPE is applied before,
  mode NONE.
- The runtime has one dtype for pages, q, k, v and attention's output. Only the kernels know that
  a cache is float16; see `schedules/generic/kv_pages.py`. What reads pages without a kernel of ours
  (export and import of a sequence's pages) would take them for float32. On a GPU the memory that
  this leaves untouched would be taken all the same, so there q, k, v and the output are float16.
- Token trees (speculative decoding) are not supported: their two kernels are left out, which
  the runtime reports when asked for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gqsa_compiler._tvm import PyExprMutator, StringImm, mutator, relax, tirx, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.cuda import attention_decode as cuda_decode
from gqsa_compiler.schedules.cuda import attention_prefill as cuda_prefill
from gqsa_compiler.schedules.cuda import kv_cache as cuda_kernels
from gqsa_compiler.schedules.generic import kv_cache as generic_kernels
from gqsa_compiler.schedules.generic.attention_common import AttentionShape
from gqsa_compiler.schedules.generic.attention_decode import attention_decode
from gqsa_compiler.schedules.generic.attention_prefill import attention_prefill
from gqsa_compiler.schedules.generic.config import has_native_half
from gqsa_compiler.schedules.generic.emit import HALF_MAX, vector_lanes
from gqsa_compiler.targets import TargetSpec

AttentionKind = Literal["mha", "mha_sliding"]
"""All earlier keys, or those of a window."""

CacheDtype = Literal["float16", "float32"]
DTYPES: tuple[CacheDtype, ...] = get_args(CacheDtype)

CREATE = "create_kv_cache"
ATTENTION = "vm.builtin.attention_kv_cache_attention_with_fused_qkv"
_MHA = 0  # AttnKind::kMHA of TVM's runtime
_ROPE_NONE = 0  # RoPEMode::kNone


@dataclass(frozen=True)
class KVCacheSpec:
    """What a model's KV cache must hold.

    Parameters
    ----------
    num_layers, num_attention_heads, num_key_value_heads, head_dim : int
    attn_kinds : tuple of str
        ``mha`` or ``mha_sliding``, one a layer.
    sliding_window : int or None
        W of the sliding layers: query i sees key j when i - W < j <= i.
    dtype : str
        Of keys and values in the pages: ``float32`` or ``float16``.
    page_size : int
        Tokens a page.

    Raises
    ------
    CompileError
        The fields do not fit together.
    """

    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attn_kinds: tuple[AttentionKind, ...]
    sliding_window: int | None = None
    dtype: CacheDtype = "float32"
    page_size: int = 16

    def __post_init__(self) -> None:
        unknown = sorted(set(self.attn_kinds) - {"mha", "mha_sliding"})
        if unknown:
            raise CompileError(f"Unknown attention kind {unknown[0]!r}; use mha or mha_sliding.")
        if len(self.attn_kinds) != self.num_layers:
            raise CompileError(
                f"{len(self.attn_kinds)} attention kinds are given for {self.num_layers} layers."
            )
        if "mha_sliding" in self.attn_kinds and not (self.sliding_window or 0) > 0:
            raise CompileError("A layer has a sliding window but its size is not given.")
        if self.dtype not in DTYPES:
            raise CompileError(
                f"A KV cache of {self.dtype} is not supported; use {' or '.join(DTYPES)}."
            )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of cache that one token takes in all layers."""
        size = 2 if self.dtype == "float16" else 4
        return self.num_layers * 2 * self.num_key_value_heads * self.head_dim * size


@mutator
class _MarkSliding(PyExprMutator):
    """Negate ``sm_scale`` where a layer has a sliding window; convert to halves if asked."""

    def __init__(self, mod: Any, spec: KVCacheSpec, halves: bool) -> None:
        super().__init__(mod)
        self.spec = spec
        self.halves = halves

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if not (
            call.op == tvm.ir.Op.get("relax.call_dps_packed")
            and isinstance(call.args[0], relax.ExternFunc)
            and call.args[0].global_symbol == ATTENTION
        ):
            return call
        cache, layer, scale, qkv = call.args[1].fields
        number = int(_value(layer))
        if not 0 <= number < self.spec.num_layers:
            raise CompileError(
                f"The module uses the KV cache of layer {number}, "
                f"but the cache has {self.spec.num_layers} layers."
            )
        if _value(scale) <= 0:
            raise CompileError(f"Layer {number}: sm_scale of attention must be positive.")
        if self.spec.attn_kinds[number] == "mha_sliding":
            scale = relax.prim_value(-_value(scale))
        if not self.halves:
            arguments = relax.Tuple([cache, layer, scale, qkv])
            return relax.Call(
                call.op, [call.args[0], arguments], call.attrs, call.ty_args, call.span
            )
        # What is beyond a half's range becomes its limit, as on a CPU.
        limits = (relax.prim_value(-HALF_MAX), relax.prim_value(HALF_MAX))
        qkv = self.builder_.emit(relax.op.clip(qkv, *limits))
        qkv = self.builder_.emit(relax.op.astype(qkv, "float16"))
        (made,) = call.ty_args
        out = relax.TensorType(made.shape, "float16")
        arguments = relax.Tuple([cache, layer, scale, qkv])
        done = relax.Call(call.op, [call.args[0], arguments], call.attrs, [out], call.span)
        return relax.op.astype(self.builder_.emit(done), made.dtype)


def _value(expr: Any) -> float:
    expr = getattr(expr, "value", expr)
    return float(getattr(expr, "value", expr))


def attach_kv_cache(mod: Any, spec: KVCacheSpec, target: TargetSpec) -> Any:
    """Add ``create_kv_cache`` and its kernels to a module, and mark its sliding layers.

    Parameters
    ----------
    mod : IRModule
        Its functions may call ``PagedKVCache.attention_with_fused_qkv`` of
        `tvm.relax.frontend.nn.llm`.
    spec : KVCacheSpec
    target : TargetSpec
        A GPU's cache has to be float16.

    Returns
    -------
    IRModule
        With ``create_kv_cache(shape) -> Object``; ``shape`` is ``Shape([max_batch,
        max_total_tokens, prefill_chunk])``: sequences at once, tokens of all of them, and new
        tokens in one forward pass.

    Raises
    ------
    CompileError
        The module and `spec` do not agree, or `spec` is not supported.
    """
    if CREATE in [var.name_hint for var in mod.get_global_vars()]:
        raise CompileError(f"The module already has a function {CREATE}.")
    on_gpu = target.kind == "cuda"
    if on_gpu and spec.dtype != "float16":
        raise CompileError(
            f"On a GPU keys and values are kept in float16, not in {spec.dtype}; "
            "choose --kv-cache float16."
        )
    marker = _MarkSliding(mod, spec, on_gpu)
    for var, function in mod.functions.items():
        if isinstance(function, relax.Function):
            marker.builder_.update_func(var, marker.visit_expr(function))
    builder = relax.BlockBuilder(marker.builder_.get())
    config = [tirx.Var(n, "int64") for n in ("max_batch", "max_total_tokens", "prefill_chunk")]
    shape = relax.Var("config", relax.ShapeType(config))
    with builder.function(CREATE, [shape]):
        cache = builder.emit(
            relax.call_pure_packed(
                "vm.builtin.paged_attention_kv_cache_create",
                *_arguments(builder, spec, target, config),
                ty_args=relax.AnyType(),
            )
        )
        builder.emit_func_output(cache)
    return builder.finalize()


def _arguments(
    builder: Any, spec: KVCacheSpec, target: TargetSpec, config: Sequence[Any]
) -> list[Any]:
    """List the creator's arguments in the order of TVM's ``paged_kv_cache.cc``."""
    kinds = spec.attn_kinds
    shape = AttentionShape(
        num_heads=spec.num_attention_heads,
        num_kv_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        page_size=spec.page_size,
        window=(spec.sliding_window or 0) if "mha_sliding" in kinds else 0,
        lanes=vector_lanes(target),
        half=spec.dtype == "float16",
        native_half=has_native_half(target),
    )

    on_gpu = target.kind == "cuda"
    kernels: Any = cuda_kernels if on_gpu else generic_kernels
    prefill: Any = cuda_prefill.attention_prefill if on_gpu else attention_prefill
    decode: Any = cuda_decode.attention_decode if on_gpu else attention_decode

    def add(name: str, function: Any) -> Any:
        return builder.add_func(function.with_attr("global_symbol", name), name)

    def backend(name: str, function: Any) -> Any:
        return relax.Tuple([StringImm("tirx"), add(name, function)])

    none = relax.Tuple([])
    number = relax.prim_value
    return [
        relax.ShapeExpr([*config, spec.page_size, 0]),  # the last: no eviction
        relax.ShapeExpr([0, spec.num_layers]),
        number(spec.num_attention_heads),
        number(spec.num_key_value_heads),
        number(spec.head_dim),
        number(spec.head_dim),
        relax.ShapeExpr([_MHA] * spec.num_layers),
        number(False),  # no transfer to other machines
        number(_ROPE_NONE),
        number(1.0),
        number(10000.0),
        number(0),  # RoPE factors; a tensor would be taken for some
        # Of a float16 cache too on a CPU, see generic/kv_pages.py.
        relax.op.zeros((), "float16" if on_gpu else "float32"),
        add("kv_cache_append", kernels.append_kv(shape)),
        number(0),  # append for MLA
        backend("attention_prefill_ragged", prefill(shape, paged=False)),
        backend("attention_prefill_paged", prefill(shape, paged=True)),
        backend("attention_decode_paged", decode(shape)),
        none,  # prefill of mha_sliding
        none,  # decode of mha_sliding
        none,  # token trees over pages
        none,  # token trees
        none,  # MLA
        relax.Tuple([add("attention_merge", kernels.merge_states(shape))]),
        add("kv_cache_split_qkv", kernels.split_qkv(shape)),
        add("kv_cache_copy_page", kernels.copy_page(shape)),
        add("kv_cache_debug_get", kernels.get_kv(shape, spec.num_layers)),
        add("kv_cache_compact", kernels.compact_copy(shape)),
    ]
