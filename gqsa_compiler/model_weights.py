"""A model's weights as the passes and the packing see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gqsa_compiler.checkpoint import BSRLayer, CheckpointReader
from gqsa_compiler.errors import CompileError
from gqsa_compiler.frontends.hf import ImportedModel
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.schedules.kv_cache import CacheDtype, KVCacheSpec

if TYPE_CHECKING:
    import numpy.typing as npt


class ModelWeights:
    """The weights of one compilation, as records and as arrays.

    Layers of another quantiser are converted when they are described and again when they are
    packed: kept in between, all of them would be in memory at once. Those of a GQSA checkpoint are
    mapped from its files, so they are kept and checked only once.
    """

    def __init__(self, source: ModelSource, imported: ImportedModel) -> None:
        self.source = source
        self.imported = imported
        self._compressed: dict[str, ParamRecord] = {}
        self._mapped: dict[str, BSRLayer] = {}
        if source.checkpoint is not None:
            for name in source.checkpoint.layer_names:
                layer = source.checkpoint.layer(name)
                self._compressed[f"{name}.weight"] = _describe(f"{name}.weight", layer)
                if isinstance(source.checkpoint, CheckpointReader):
                    self._mapped[f"{name}.weight"] = layer

    def load(self, name: str) -> npt.NDArray[Any]:
        """Return a dense parameter."""
        return self.imported.load(name)

    def layer(self, name: str) -> BSRLayer:
        """Return a compressed layer by its parameter's name."""
        checkpoint = self.source.checkpoint
        if checkpoint is None or name in self._mapped:
            return self._mapped[name]
        return checkpoint.layer(name.removesuffix(".weight"))

    def records(self) -> tuple[ParamRecord, ...]:
        """Describe every parameter of the imported module, in order."""
        names = self.imported.params
        unknown = sorted(set(self._compressed) - set(names))
        if unknown:
            raise CompileError(
                f"The checkpoint has {len(unknown)} compressed layers that the model does not "
                f"use: {', '.join(unknown[:5])}."
            )
        stored = set(self.source.tensor_names())
        func = next(f for _, f in self.imported.mod.functions_items() if "num_input" in f.attrs)
        variables = list(func.params)[int(func.attrs["num_input"]) :]
        return tuple(
            self._record(name, tuple(int(size) for size in variable.ty.shape), name in stored)
            for name, variable in zip(names, variables, strict=True)
        )

    def _dense_dtype(self, name: str, shape: tuple[int, ...], stored: bool) -> str:
        if not stored or len(shape) < 2:
            return "float32"  # norms, biases and rotary tables: small, and read in float32
        dtype = self.source.dtype(name)
        # A quantised GGUF decodes to float32; half of that holds all that its few bits said.
        return "float16" if self.source.kind == "gguf" and dtype == "float32" else dtype

    def _record(self, name: str, shape: tuple[int, ...], stored: bool) -> ParamRecord:
        compressed = self._compressed.get(name)
        if compressed is not None:
            return compressed
        return ParamRecord(name, "dense", self._dense_dtype(name, shape, stored), shape)


def _describe(name: str, layer: BSRLayer) -> ParamRecord:
    return ParamRecord(
        name,
        "bsr",
        f"int{layer.bits}",
        layer.shape,
        group_size=layer.group_size,
        nnz=layer.nnz,
        symmetric=layer.symmetric,
    )


def kv_spec(imported: ImportedModel, dtype: CacheDtype) -> KVCacheSpec:
    """Describe the cache of an imported model."""
    model = imported.model
    return KVCacheSpec(
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        attn_kinds=tuple(model.attn_kinds),
        sliding_window=model.sliding_window,
        dtype=dtype,
    )
