"""Whether the stored tensors are those that the configuration asks for."""

from __future__ import annotations

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.models.registry import architecture


def check_tensors(source: ModelSource, config: DecoderConfig) -> None:
    """Check that the model's tensors and those of its definition are the same set.

    Every reader of weights calls this first, so that none accepts what another refuses. It reads
    shapes, no weights, and stops at the first layer that is not there.

    Parameters
    ----------
    source : ModelSource
    config : DecoderConfig
        Its configuration, parsed.

    Raises
    ------
    ModelError
        A tensor is missing, has another shape, or has no place in the definition.
    """
    where = str(source.path)
    stored = set(source.tensor_names())
    wanted = set()
    for name, shape in architecture(config.model_type, where).tensors(config):
        if name not in stored:
            hint = (
                " (tie_word_embeddings is false, so the model needs one)"
                if name == "lm_head.weight"
                else ""
            )
            raise ModelError(f"{where} lacks the tensor {name!r}{hint}.")
        if source.shape(name) != shape:
            raise ModelError(
                f"{where}: {name} has the shape {list(source.shape(name))}, but config.json "
                f"asks for {list(shape)}."
            )
        wanted.add(name)
    # A tied model may store its output matrix all the same; old checkpoints store frequencies.
    known = {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = sorted(
        name for name in stored - wanted - known if not name.endswith("rotary_emb.inv_freq")
    )
    if extra:
        raise ModelError(
            f"{where} has the tensor {extra[0]!r}, which a {config.model_type} model with "
            "this config.json does not use."
        )
