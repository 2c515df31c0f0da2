"""Any model source as a transformers model: what compression starts from and parity is against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.fit import check_tensors
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.models.fields import IRRELEVANT
from gqsa_compiler.models.registry import parse_config

if TYPE_CHECKING:
    from gqsa_compiler.checkpoint import CheckpointReader

_TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def to_torch(array: npt.NDArray[Any]) -> Tensor:
    """Copy a float16, bfloat16 or float32 array to a tensor of the same dtype."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """View a CPU tensor as an array; bfloat16 becomes `ml_dtypes.bfloat16`."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        bits: npt.NDArray[Any] = tensor.contiguous().view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def build_model(source: ModelSource, dtype: torch.dtype = torch.float32) -> Any:
    """Build the transformers model of a source with uninitialised weights, for inference.

    Buffers (rotary frequencies) are computed; parameters take no memory until they are written.

    Raises
    ------
    ModelError
        The stored tensors are not those of the configuration, or transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from gqsa_compiler.frontends._transformers import no_init_weights

    check_tensors(source, parse_config(source.config, str(source.path)))
    # What the compiler does not read may have any value; transformers need not choke on it. A
    # padding token only matters to training.
    fields = {key: value for key, value in source.config.items() if key not in IRRELEVANT}
    fields["pad_token_id"] = None
    try:
        config = AutoConfig.for_model(source.config["model_type"], **fields)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (KeyError, ValueError) as error:
        raise ModelError(f"transformers cannot build the model {source.path}: {error}") from error
    model.tie_weights()
    return model.eval().requires_grad_(False)


def load_parameters(
    module: nn.Module,
    prefix: str,
    source: ModelSource,
    *,
    skip: str | frozenset[str] | None = None,
) -> None:
    """Read the parameters of `module`, whose path in the model is `prefix`, from the source.

    They keep the module's dtype; whatever storage they had is dropped. Those whose names inside
    the module begin with `skip`, or are in it if it is a set, are left alone.

    Raises
    ------
    ModelError
        A parameter is missing or has another shape.
    """
    names = set(source.tensor_names())
    for name, parameter in module.named_parameters():
        if name.startswith(skip) if isinstance(skip, str) else skip is not None and name in skip:
            continue
        stored = f"{prefix}.{name}" if prefix else name
        if stored not in names:
            raise ModelError(f"{source.path} has no tensor {stored!r}, which the model needs.")
        tensor = to_torch(source.tensor(stored)).to(parameter.dtype)
        if tensor.shape != parameter.shape:
            raise ModelError(
                f"{source.path}: {stored} has shape {list(tensor.shape)}, but config.json asks "
                f"for {list(parameter.shape)}."
            )
        parameter.data = tensor


def stored_dtype(source: ModelSource) -> torch.dtype:
    """Return the dtype of the source's embedding: float32, float16 or bfloat16.

    Raises
    ------
    ModelError
        There is no embedding, or its stored dtype is not a float one.
    """
    name = next((name for name in source.tensor_names() if "embed" in name), None)
    if name is None:
        raise ModelError(f"{source.path} has no embedding among its weights.")
    return _TORCH_DTYPES[source.dtype(name)]


def load_dense(source: ModelSource, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a model, of whatever kind, with all its weights, and its tokenizer.

    Parameters
    ----------
    source : ModelSource
        ``hf`` and ``gguf`` are read as they are, the layers of a ``gqsa`` one are decoded.
    dtype : torch.dtype, optional
        Of the parameters; by default the stored one (float32 for GGUF).

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode, without gradients.
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    ModelError
        A tensor is missing or malformed, or there is no usable tokenizer.
    """
    model = build_model(source, dtype or stored_dtype(source))
    load_parameters(model, "", source)
    return model, load_tokenizer(source)


def load_checkpoint_dense(source: ModelSource | CheckpointReader) -> Any:
    """Load a GQSA checkpoint as a float32 transformers model with the decoded weights.

    Parameters
    ----------
    source : ModelSource or CheckpointReader
        Of kind ``gqsa``.

    Returns
    -------
    transformers.PreTrainedModel
        The reference that compiled artefacts are compared with.

    Raises
    ------
    ModelError
        The source is not a GQSA checkpoint.
    """
    if not isinstance(source, ModelSource):
        from gqsa_compiler.frontends.resolve import resolve

        source = resolve(str(source.path))
    if source.checkpoint is None:
        raise ModelError(f"{source.path} is not a GQSA checkpoint; compress it first.")
    model = build_model(source, torch.float32)
    load_parameters(model, "", source)
    return model


def load_tokenizer(source: ModelSource) -> Any:
    """Load the source's tokenizer with transformers.

    Raises
    ------
    ModelError
        There is none that transformers can read.
    """
    import tempfile
    from pathlib import Path

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        source.save_tokenizer(Path(directory))
        try:
            return AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"The tokenizer of {source.path} cannot be read: {error}") from error
