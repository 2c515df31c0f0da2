"""The only place that uses what transformers does not promise to keep between releases.

Written for transformers 5.23. A name that is gone is one clear error and no traceback.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

from gqsa_compiler.errors import ModelError

KNOWN_RELEASE = "5.23"

_GGUF = "transformers.modeling_gguf_pytorch_utils"


def private(module: str, name: str) -> Any:
    """Import one name.

    Raises
    ------
    ModelError
        The installed release does not have it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ModelError(
            f"gqsa uses {module}.{name}, which transformers {version('transformers')} does not "
            f"have; install transformers {KNOWN_RELEASE}."
        ) from error


def no_init_weights() -> AbstractContextManager[None]:
    """Return a context in which new models' parameters are left uninitialised."""
    context: AbstractContextManager[None] = private(
        "transformers.initialization", "no_init_weights"
    )()
    return context


def gguf_config_fields(architecture: str) -> Mapping[str, str | None]:
    """Return GGUF's metadata names of a supported architecture and the HF fields they become."""
    table = private("transformers.integrations", "GGUF_CONFIG_MAPPING")
    fields: Mapping[str, str | None] = table[architecture]
    return fields


def gguf_weight_names(model: Any, processor: Any) -> Mapping[str, str]:
    """Return GGUF's tensor names of a transformers model and the HF names they become."""
    names: Mapping[str, str] = private(_GGUF, "get_gguf_hf_weights_map")(model, processor)
    return names


def gguf_tensor_processor(architecture: str, config: Mapping[str, Any]) -> Any:
    """Return what undoes the changes that the conversion to GGUF made to tensors."""
    default = private(_GGUF, "TensorProcessor")
    return private(_GGUF, "TENSOR_PROCESSORS").get(architecture, default)(config=config)


def gguf_tokenizer_splits() -> Mapping[str, str]:
    """Return the values of ``tokenizer.ggml.pre`` that transformers splits text for, and how."""
    module = "transformers.integrations.gguf.gguf_tokenizer_mapping"
    splits: Mapping[str, str] = private(module, "GGUF_PRE_TOKENIZER_SPLITS")
    return splits
