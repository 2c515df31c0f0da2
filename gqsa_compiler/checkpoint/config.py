"""`quantization_config`: what config.json says about a checkpoint's compression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gqsa_compiler.errors import CheckpointError
from gqsa_compiler.limits import BALANCES, BITS, GROUP_SIZES

QUANT_METHOD = "gqsa"
FORMAT_VERSION = 1
STRUCTURE = "group"

_REQUIRED = {
    "quant_method",
    "format_version",
    "bits",
    "group_size",
    "symmetric",
    "sparsity",
    "producer",
}
_OPTIONAL = {"ignore", "per_layer"}
_LAYER_KEYS = {"bits", "group_size", "symmetric", "ratio"}


@dataclass(frozen=True)
class LayerScheme:
    """How one layer is compressed.

    Parameters
    ----------
    bits : int
        Bits of a code: 2, 3, 4 or 8.
    group_size : int
        A power of two, 8 to 256.
    symmetric : bool
        No zero points are stored.
    ratio : float
        Share of groups that were asked to be dropped, 0 <= ratio < 1. Informational.
    """

    bits: int
    group_size: int
    symmetric: bool
    ratio: float

    def __post_init__(self) -> None:
        """Check every field; raises CheckpointError."""
        if not _is_int(self.bits) or self.bits not in BITS:
            raise CheckpointError(
                f"quantization_config says bits {self.bits!r}; it must be one of "
                f"{', '.join(map(str, BITS))}."
            )
        if not _is_int(self.group_size) or self.group_size not in GROUP_SIZES:
            raise CheckpointError(
                f"quantization_config says group_size {self.group_size!r}; it must be one of "
                f"{', '.join(map(str, GROUP_SIZES))}."
            )
        if not isinstance(self.symmetric, bool):
            raise CheckpointError(
                f"quantization_config says symmetric {self.symmetric!r}; it must be true or false."
            )
        is_number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not is_number or not 0 <= self.ratio < 1:
            raise CheckpointError(
                f"quantization_config says sparsity ratio {self.ratio!r}; it must be at least 0 "
                "and below 1."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a `per_layer` entry."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "ratio": self.ratio,
        }


@dataclass(frozen=True)
class QuantizationConfig:
    """config.json's `quantization_config`.

    Parameters
    ----------
    bits, group_size, symmetric, ratio
        The scheme of every layer that `per_layer` does not name; see `LayerScheme`.
    balance : str
        ``matrix`` (groups are dropped anywhere in a matrix), ``row`` (as many in every row) or
        ``model`` (the share of a matrix was chosen too). Informational.
    ignore : tuple of str
        Linear layers (module paths) that were left uncompressed on purpose.
    per_layer : mapping of str to LayerScheme
        Layers (module paths) with a scheme of their own.
    producer : str
        Program and version, e.g. ``gqsa-compiler 0.1.0``.

    Raises
    ------
    CheckpointError
        A field has an impossible value.
    """

    bits: int = 4
    group_size: int = 16
    symmetric: bool = False
    ratio: float = 0.0
    balance: str = "matrix"
    ignore: tuple[str, ...] = ()
    per_layer: Mapping[str, LayerScheme] = field(default_factory=dict)
    producer: str = ""

    def __post_init__(self) -> None:
        """Check every field; raises CheckpointError."""
        LayerScheme(self.bits, self.group_size, self.symmetric, self.ratio)
        if self.balance not in BALANCES:
            raise CheckpointError(
                f"quantization_config says balance {self.balance!r}; it must be one of "
                f"{', '.join(BALANCES)}."
            )
        if not isinstance(self.producer, str):
            raise CheckpointError("quantization_config's producer is not text.")
        both = sorted(set(self.ignore) & set(self.per_layer))
        if both:
            raise CheckpointError(
                f"quantization_config names layer {both[0]!r} in ignore and in per_layer."
            )
        object.__setattr__(self, "ignore", tuple(self.ignore))
        # A plain dict: a mapping proxy could not be copied or pickled.
        object.__setattr__(self, "per_layer", dict(self.per_layer))

    def scheme(self, layer: str) -> LayerScheme:
        """Return how the layer of this name is compressed."""
        default = LayerScheme(self.bits, self.group_size, self.symmetric, self.ratio)
        return self.per_layer.get(layer, default)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object; inverse of `from_dict`."""
        value: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "sparsity": {"structure": STRUCTURE, "ratio": self.ratio, "balance": self.balance},
            "ignore": list(self.ignore),
            "producer": self.producer,
        }
        if self.per_layer:
            value["per_layer"] = {name: s.to_dict() for name, s in self.per_layer.items()}
        return value

    @classmethod
    def from_dict(cls, value: Any) -> QuantizationConfig:
        """Read the JSON object, strictly: a key or version that is not known is an error.

        Raises
        ------
        CheckpointError
            It is another method's, of another version, or a field is missing, unknown or
            impossible. The message names the field.
        """
        if not isinstance(value, dict):
            raise CheckpointError("quantization_config is not a JSON object.")
        method = value.get("quant_method")
        if method != QUANT_METHOD:
            raise CheckpointError(
                f"quantization_config says quant_method {method!r}; this is not a GQSA checkpoint "
                f"({QUANT_METHOD!r})."
            )
        version = value.get("format_version")
        if not _is_int(version) or version != FORMAT_VERSION:
            raise CheckpointError(
                f"The checkpoint has format_version {version!r}; this program reads "
                f"{FORMAT_VERSION}. Use the version of gqsa-compiler that wrote it "
                f"({value.get('producer')!r}), or compress the model again."
            )
        _check_keys("quantization_config", value, _REQUIRED, _OPTIONAL)
        sparsity = value["sparsity"]
        if not isinstance(sparsity, dict):
            raise CheckpointError("quantization_config's sparsity is not a JSON object.")
        keys = {"structure", "ratio", "balance"}
        _check_keys("quantization_config's sparsity", sparsity, keys, set())
        if sparsity["structure"] != STRUCTURE:
            raise CheckpointError(
                f"quantization_config says sparsity structure {sparsity['structure']!r}; "
                f"this version reads {STRUCTURE!r}."
            )
        ignore = value.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise CheckpointError("quantization_config's ignore is not a list of layer names.")
        defaults = LayerScheme(
            value["bits"], value["group_size"], value["symmetric"], sparsity["ratio"]
        )
        return cls(
            bits=defaults.bits,
            group_size=defaults.group_size,
            symmetric=defaults.symmetric,
            ratio=defaults.ratio,
            balance=sparsity["balance"],
            ignore=tuple(ignore),
            per_layer=_per_layer(value.get("per_layer", {}), defaults),
            producer=value["producer"],
        )


def _per_layer(value: Any, defaults: LayerScheme) -> dict[str, LayerScheme]:
    if not isinstance(value, dict):
        raise CheckpointError("quantization_config's per_layer is not a JSON object.")
    schemes = {}
    for name, entry in value.items():
        if not isinstance(entry, dict):
            raise CheckpointError(f"quantization_config's per_layer {name!r} is not an object.")
        _check_keys(f"quantization_config's per_layer {name!r}", entry, set(), _LAYER_KEYS)
        try:
            schemes[name] = LayerScheme(**{**defaults.to_dict(), **entry})
        except CheckpointError as error:
            raise CheckpointError(f"In per_layer {name!r}: {error}") from error
    return schemes


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_keys(what: str, value: dict[str, Any], required: set[str], optional: set[str]) -> None:
    missing = sorted(required - value.keys())
    if missing:
        raise CheckpointError(f"{what} lacks {missing[0]!r}; see docs/format.md.")
    unknown = sorted(value.keys() - required - optional)
    if unknown:
        raise CheckpointError(
            f"{what} has the unknown field {unknown[0]!r}; it may come from a newer gqsa-compiler."
        )
