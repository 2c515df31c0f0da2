"""Rotary position embedding: its parameters, and its cosine and sine table.

The frequencies follow transformers' ``ROPE_INIT_FUNCTIONS``, computed here in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gqsa_compiler.models.fields import FieldReader

MIN_THETA = 1.0
"""At a base of 1 every feature turns at the same speed, and YaRN divides by its logarithm."""

RopeKind = Literal["default", "linear", "llama3", "yarn"]

_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "original_max_position_embeddings",
            "truncate",
        }
    ),
}
_COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True)
class RopeParameters:
    """One rotary embedding.

    Parameters
    ----------
    kind : str
        ``default``, ``linear``, ``llama3`` or ``yarn``.
    theta : float
        The base of the frequencies.
    factor : float
        How much longer the context is than the original one.
    original_max_position_embeddings : int
        Context length in tokens before scaling (``llama3``, ``yarn``).
    low_freq_factor, high_freq_factor : float
        ``llama3``'s band limits.
    beta_fast, beta_slow : float
        ``yarn``'s band limits, in rotations over the original context.
    truncate : bool
        Whether ``yarn`` rounds its band to whole features.
    attention_factor : float
        Factor of cosines and sines.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def inverse_frequencies(self, dim: int) -> npt.NDArray[np.float64]:
        """Return the angle in radians per position of each feature pair, float64 [dim / 2]."""
        inv = self.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        if self.kind == "linear":
            return inv / self.factor
        if self.kind == "llama3":
            return self._llama3(inv)
        if self.kind == "yarn":
            return self._yarn(inv, dim)
        return inv

    def _llama3(self, inv: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # Slow features are interpolated, fast ones kept, those between blended.
        turns = self.original_max_position_embeddings * inv / (2 * math.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return (1 - blend) * inv / self.factor + blend * inv

    def _yarn(self, inv: npt.NDArray[np.float64], dim: int) -> npt.NDArray[np.float64]:
        def feature_with(rotations: float) -> float:
            positions = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return dim * math.log(positions) / (2 * math.log(self.theta))

        low, high = feature_with(self.beta_fast), feature_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        return inv / self.factor * ramp + inv * (1 - ramp)

    def table(self, positions: int, dim: int) -> npt.NDArray[np.float32]:
        """Return cosines, then sines, of every position: float32 [positions, dim]."""
        angles = np.outer(np.arange(positions, dtype=np.float64), self.inverse_frequencies(dim))
        both = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return (both * self.attention_factor).astype(np.float32)


def read_rope(fields: FieldReader, max_positions: int) -> RopeParameters:
    """Take the rotary embedding's fields, in either spelling.

    transformers 5 writes ``rope_parameters``; before that it was ``rope_theta`` and
    ``rope_scaling``.

    Parameters
    ----------
    fields : FieldReader
    max_positions : int
        The model's ``max_position_embeddings``.

    Raises
    ------
    ModelError
        A kind of scaling, or a field of it, that is not understood.
    """
    fields.neutral("partial_rotary_factor", 1.0, None)
    return combine_rope(
        fields,
        fields.raw("rope_parameters", None),
        fields.raw("rope_scaling", None),
        theta_field="rope_theta",
        default_theta=10000.0,
        max_positions=max_positions,
    )


def combine_rope(
    fields: FieldReader,
    parameters: Any,
    scaling: Any,
    *,
    theta_field: str,
    default_theta: float,
    max_positions: int,
) -> RopeParameters:
    """Read one rotary embedding from whichever spelling is there, or from both if they agree.

    Parameters
    ----------
    fields : FieldReader
    parameters, scaling : Any
        What ``rope_parameters`` and ``rope_scaling`` say about it; None where they say nothing.
    theta_field : str
        The field of the older spelling that holds the base.
    default_theta : float
    max_positions : int
        The model's ``max_position_embeddings``.

    Raises
    ------
    ModelError
        As `read_rope`; or the two spellings differ: which one a model was trained with is
        anybody's guess.
    """
    theta = fields.number(theta_field, default_theta, above=MIN_THETA)
    if parameters is None:
        return _parse(fields, "rope_scaling", scaling, theta, max_positions)
    rope = _parse(fields, "rope_parameters", parameters, theta, max_positions)
    if fields.raw(theta_field, None) is not None and theta != rope.theta:
        raise fields.error(
            theta_field, f"= {theta} differs from the {rope.theta} of 'rope_parameters'"
        )
    if scaling is not None and rope != _parse(
        fields, "rope_scaling", scaling, theta, max_positions
    ):
        raise fields.error("rope_scaling", "says something else than 'rope_parameters'")
    return rope


def _parse(
    fields: FieldReader, where: str, values: Any, theta: float, max_positions: int
) -> RopeParameters:
    """Read one dictionary of rotary parameters; `where` names the field it came from."""
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise fields.error(where, f"must be an object, not {values!r}")
    scaling = {key: value for key, value in values.items() if value is not None}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise fields.error(where, f"has rope_type {kind!r}; supported are {', '.join(_KEYS)}")
    unknown = sorted(set(scaling) - _KEYS[kind] - _COMMON_KEYS)
    if kind == "default":
        # Written by transformers beside "default", where nothing reads it.
        unknown = [key for key in unknown if key != "original_max_position_embeddings"]
    if unknown:
        raise fields.error(where, f"has {unknown[0]!r}, which is not understood for {kind!r}")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error(where, "rotates only a part of each head")
    numbers = FieldReader(f"{fields.family} {where}", scaling)
    theta = numbers.number("rope_theta", theta, above=MIN_THETA)
    if kind == "default":
        return RopeParameters(theta=theta)
    if kind == "yarn" and "factor" not in scaling:
        original = numbers.integer("original_max_position_embeddings", max_positions)
        scaling["factor"] = max_positions / original
    factor = numbers.number("factor")
    if factor < 1.0:
        raise fields.error(where, f"has factor {factor}; it must be at least 1")
    if kind == "linear":
        return RopeParameters("linear", theta, factor)
    if kind == "llama3":
        original = numbers.integer("original_max_position_embeddings")
        low, high = (numbers.number(f"{band}_freq_factor", above=0.0) for band in ("low", "high"))
        if high <= low:
            raise fields.error(where, "has a high_freq_factor that is not above low_freq_factor")
        return RopeParameters("llama3", theta, factor, original, low, high)
    original = numbers.integer("original_max_position_embeddings", max_positions)
    return RopeParameters(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=numbers.number("beta_fast", 32.0, minimum=0.0) or 32.0,
        beta_slow=numbers.number("beta_slow", 1.0, minimum=0.0) or 1.0,
        truncate=numbers.boolean("truncate", True),
        attention_factor=_yarn_attention_factor(numbers, scaling, factor),
    )


def _yarn_attention_factor(
    numbers: FieldReader, scaling: Mapping[str, Any], factor: float
) -> float:
    if "attention_factor" in scaling:
        return numbers.number("attention_factor", above=0.0)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0

    mscale = numbers.number("mscale", 0.0, minimum=0.0)
    mscale_all_dim = numbers.number("mscale_all_dim", 0.0, minimum=0.0)
    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)
