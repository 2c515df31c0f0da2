"""JSON documents as dataclasses, by their annotations: what does not fit is an error."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from gqsa_compiler.runtime.errors import ArtefactError

_INT64 = 1 << 63


def decode(kind: Any, value: Any, where: str) -> Any:
    """Check a JSON document against a schema of dataclasses and build it.

    Raises
    ------
    ArtefactError
        A missing or unknown key, or a value of a wrong type.

    """
    return _decode(kind, value, where, "")


def _decode(kind: Any, value: Any, where: str, key: str) -> Any:
    """Check `value` against a type annotation of the schema and convert it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):  # the schema has no union but `X | None`
        return None if value is None else _decode(args[0], value, where, key)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _decode_record(kind, value, where, key)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_decode(args[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:  # an exact type: True is no int here
        if isinstance(value, int) and not -_INT64 <= value < _INT64:
            raise ArtefactError(f"{where}: {key} does not fit into 64 bits.")
        return value
    expected = "a list" if origin is tuple else getattr(kind, "__name__", str(kind))
    raise ArtefactError(f"{where}: {key or 'the document'} should be {expected}, not {value!r}.")


def _decode_record(kind: Any, value: Mapping[str, Any], where: str, key: str) -> Any:
    prefix = f"{key}." if key else ""
    hints = get_type_hints(kind)
    required = {f.name for f in fields(kind) if f.default is MISSING}
    for name in sorted(required - value.keys()):
        raise ArtefactError(f"{where} has no {prefix}{name}.")
    for name in sorted(map(str, value.keys() - hints.keys())):
        raise ArtefactError(f"{where} has the unknown key {prefix}{name}.")
    return kind(**{k: _decode(hints[k], v, where, prefix + k) for k, v in value.items()})


def plain(value: Any) -> Any:
    """Return plain dictionaries and lists of what `asdict` gives."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
