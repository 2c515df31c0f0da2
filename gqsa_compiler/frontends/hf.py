"""Import a decoder LLM: one Relax module, its parameters' names, and how to load each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler._tvm import PagedKVCache, nn, tvm
from gqsa_compiler.errors import UsageError
from gqsa_compiler.frontends.fit import check_tensors
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.models.layers import CausalLM
from gqsa_compiler.models.registry import architecture, parse_config
from gqsa_compiler.schedules.kv_cache import AttentionKind

DEFAULT_CONTEXT = 2048
"""Tokens of context when none are asked for, where the model has as many."""

ROPE_TABLE = "rope.cos_sin"
LOCAL_ROPE_TABLE = "rope.local.cos_sin"


@dataclass(frozen=True)
class ModelConfigSummary:
    """What the rest of the compiler needs to know about a model.

    Parameters
    ----------
    architecture : str
        ``model_type``.
    vocab_size, hidden_size, num_layers : int
    num_attention_heads, num_key_value_heads, head_dim : int
    context_length : int
        Tokens of the longest sequence that the module serves.
    sliding_window : int or None
        Tokens a ``mha_sliding`` layer sees, itself included; None when no layer is.
    attn_kinds : tuple of str
        ``mha`` or ``mha_sliding`` for each layer. A window that is no shorter than the context is
        no window.
    bos_token_id : int or None
    eos_token_ids : tuple of int
        Those of the configuration; the tokenizer's files may know more.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    context_length: int
    sliding_window: int | None
    attn_kinds: tuple[AttentionKind, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ImportedModel:
    """A model as a Relax module that still computes densely in float32.

    Parameters
    ----------
    mod : tvm.IRModule
        Functions ``forward``, ``hidden_states`` and ``logits``, each with the attribute
        ``num_input`` and, after the inputs, one float32 parameter for each of `params`.
    model : ModelConfigSummary
    params : tuple of str
        The parameters' names: Hugging Face's tensor names, and the rotary tables.
    """

    mod: Any
    model: ModelConfigSummary
    params: tuple[str, ...]
    _source: ModelSource
    _config: DecoderConfig
    _definition: CausalLM

    @property
    def head(self) -> str:
        """Name of the parameter that the language-model head multiplies with."""
        if not self._config.tie_word_embeddings:
            return "lm_head.weight"
        return next(name for name in self.params if name.endswith("embed_tokens.weight"))

    def load(self, name: str) -> npt.NDArray[Any]:
        """Read or compute one parameter.

        Parameters
        ----------
        name : str
            One of `params`.

        Returns
        -------
        numpy.ndarray
            Matrices in their stored dtype (float32, float16 or bfloat16); vectors and rotary
            tables in float32.

        Raises
        ------
        ModelError
            The tensor cannot be read.
        """
        rope = {ROPE_TABLE: self._config.rope, LOCAL_ROPE_TABLE: self._config.rope_local}.get(name)
        if rope is not None:
            return rope.table(self.model.context_length, self.model.head_dim)
        array = self._definition.adapt(name, self._source.tensor(name))
        return array.astype(np.float32) if array.ndim == 1 else array


def import_model(source: ModelSource, *, context_length: int | None) -> ImportedModel:
    """Build the Relax module of a model.

    Parameters
    ----------
    source : ModelSource
    context_length : int or None
        Tokens of the longest sequence; None means the model's own maximum, at most
        `DEFAULT_CONTEXT`.

    Returns
    -------
    ImportedModel

    Raises
    ------
    UsageError
        A context longer than the model's, or below 1.
    ModelError
        The configuration is not understood, or does not fit the weights.
    """
    where = str(source.path)
    config = parse_config(source.config, where)
    context = context_length
    if context is None:
        context = min(config.max_position_embeddings, DEFAULT_CONTEXT)
    if context < 1:
        raise UsageError(f"The context length must be at least 1, not {context}.")
    if context > config.max_position_embeddings:
        raise UsageError(
            f"The context length {context} is more than the model's "
            f"{config.max_position_embeddings}; choose at most that."
        )
    check_tensors(source, config)
    definition = architecture(config.model_type, where).load_model_class()(config, context)
    mod, parameters = definition.export_tvm(spec=_module_spec(config))
    shapes = {name: tuple(int(size) for size in p.shape) for name, p in parameters}
    return ImportedModel(
        mod=_non_negative(mod),
        model=_summary(config, context),
        params=tuple(shapes),
        _source=source,
        _config=config,
        _definition=definition,
    )


def _module_spec(config: DecoderConfig) -> dict[str, Any]:
    tokens = nn.spec.Tensor(["n"], "int32")
    rows = nn.spec.Tensor(["m"], "int32")
    hidden = nn.spec.Tensor(["m", config.hidden_size], "float32")
    cache = nn.spec.Object(object_type=PagedKVCache)
    mode = {"param_mode": "plain", "effect_mode": "none"}
    return {
        "forward": {"tokens": tokens, "rows": rows, "kv": cache, "$": mode},
        "hidden_states": {"tokens": tokens, "kv": cache, "$": mode},
        "logits": {"hidden": hidden, "$": mode},
    }


def _non_negative(mod: Any) -> Any:
    """Tell the memory planner that no call has a negative number of tokens or rows."""
    for name in ("forward", "hidden_states", "logits"):
        mod[name] = mod[name].with_attr("tir_non_negative_var", ["n", "m"])
    return tvm.IRModule(mod.functions, attrs=mod.attrs)


def _summary(config: DecoderConfig, context: int) -> ModelConfigSummary:
    window = config.sliding_window
    if window is not None and window >= context:
        window = None
    kinds: tuple[AttentionKind, ...] = tuple(
        "mha_sliding" if kind == "sliding" and window is not None else "mha"
        for kind in config.layer_kinds
    )
    return ModelConfigSummary(
        architecture=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        context_length=context,
        sliding_window=window,
        attn_kinds=kinds,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
    )
