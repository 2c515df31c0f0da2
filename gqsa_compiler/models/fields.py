"""Read a configuration strictly: a field that is not understood is an error, never ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gqsa_compiler.errors import ModelError

# fmt: off
IRRELEVANT = frozenset({
    # Bookkeeping of transformers and of tools around it.
    "architectures", "model_type", "transformers_version", "_name_or_path",
    "_model_name_or_path", "name_or_path", "_commit_hash", "torch_dtype", "dtype", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "gradient_checkpointing", "tokenizer_class", "task",
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "attn_implementation", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "chunk_size_feed_forward",
    "transformers.js_config", "unsloth_version", "unsloth_fixed", "model_name",
    "is_llama_config", "quantization_config",
    # Training only.
    "initializer_range", "init_std", "attention_dropout",
    # How to generate: generation_config.json's business, not the graph's.
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "return_dict_in_generate", "output_scores", "remove_invalid_values",
    "exponential_decay_length_penalty", "prefix", "pad_token_id", "unk_token_id",
    "sep_token_id", "decoder_start_token_id",
})
# fmt: on
"""Fields of every family that do not change what the decoder computes."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True, None),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "per_layer_config": (None,),
}
"""Fields of every family that are only understood at these values."""

MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 1e38
"""Sizes fit int32 and numbers float32 in what is compiled, so larger ones are mistakes."""

_MISSING: Any = object()


class FieldReader:
    """Hands out the fields of a configuration and remembers which were asked for.

    Parameters
    ----------
    family : str
        The ``model_type``, for messages.
    fields : dict
        The configuration.
    """

    def __init__(self, family: str, fields: Mapping[str, Any]) -> None:
        self.family = family
        self._fields = fields
        self._seen: set[str] = set()

    def raw(self, name: str, default: Any = _MISSING) -> Any:
        """Take a field of any type; without a default it must be there."""
        self._seen.add(name)
        value = self._fields.get(name, default)
        if value is _MISSING:
            raise ModelError(f"The {self.family} configuration lacks {name!r}.")
        return value

    def integer(
        self, name: str, default: Any = _MISSING, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int:
        """Take an integer of `minimum` to `maximum`; null means the default."""
        value = self._typed(name, default, (int,), "an integer")
        if value < minimum:
            raise self.error(name, f"must be at least {minimum}, not {_short(value)}")
        if value > maximum:
            raise self.error(name, f"must be at most {maximum}, not {_short(value)}")
        return int(value)

    def number(
        self,
        name: str,
        default: Any = _MISSING,
        *,
        minimum: float = -MAX_NUMBER,
        above: float | None = None,
    ) -> float:
        """Take a finite number of at least `minimum`, or `above` a limit; null is the default."""
        value = self._typed(name, default, (int, float), "a number")
        if not abs(value) <= MAX_NUMBER:  # NaN compares false
            raise self.error(name, f"must be a finite number, not {_short(value)}")
        if above is not None and value <= above:
            raise self.error(name, f"must be more than {above:g}, not {_short(value)}")
        if value < minimum:
            raise self.error(name, f"must be at least {minimum:g}, not {_short(value)}")
        return float(value)

    def boolean(self, name: str, default: Any = _MISSING) -> bool:
        """Take true or false; null means the default."""
        return bool(self._typed(name, default, (bool,), "true or false"))

    def text(self, name: str, default: Any = _MISSING) -> str:
        """Take a string; null means the default."""
        return str(self._typed(name, default, (str,), "a string"))

    def optional_integer(self, name: str) -> int | None:
        """Take an integer of at least 1, or None when it is absent or null."""
        if self.raw(name, None) is None:
            return None
        return self.integer(name)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Take a token id, a list of them or null, as a tuple."""
        value = self.raw(name, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int and 0 <= v <= MAX_INTEGER for v in values):
            raise self.error(name, f"must be a token id or a list of them, not {_short(value)}")
        return tuple(values)

    def neutral(self, name: str, *allowed: Any) -> None:
        """Accept a field only at values that leave the decoder as it is."""
        value = self.raw(name, allowed[0])
        # 0 == False in Python; a config that says 0 for false means the same.
        if value not in allowed:
            wanted = " or ".join(repr(v) for v in allowed)
            raise self.error(name, f"is {_short(value)}; only {wanted} is supported")

    def ignore(self, names: Iterable[str]) -> None:
        """Mark fields as known to be irrelevant."""
        self._seen.update(names)

    def finish(self) -> None:
        """Check that no field was left over.

        Raises
        ------
        ModelError
            Names the first field that this family does not know.
        """
        self.ignore(IRRELEVANT)
        for name, allowed in NEUTRAL.items():
            self.neutral(name, *allowed)
        unknown = sorted(set(self._fields) - self._seen)
        if unknown:
            name = unknown[0]
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise self.error(name, f"= {_short(self._fields[name])} is not understood{more}")

    def error(self, name: str, problem: str) -> ModelError:
        """Build the error about one field."""
        return ModelError(
            f"The {self.family} configuration field {name!r} {problem}; "
            "gqsa does not compile what it cannot reproduce."
        )

    def _typed(self, name: str, default: Any, types: tuple[type, ...], what: str) -> Any:
        value = self.raw(name, default)
        if value is None and default is not _MISSING:
            value = default
        is_wanted = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not is_wanted:
            raise self.error(name, f"must be {what}, not {_short(value)}")
        return value


def _short(value: Any) -> str:
    """Show a value, of whatever length, in a message."""
    # repr() refuses integers of thousands of digits.
    huge = isinstance(value, int) and value.bit_length() > 400
    text = f"an integer of {value.bit_length()} bits" if huge else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
