"""What has to hold between the parts of a manifest."""

from __future__ import annotations

from collections.abc import Sequence

from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.schema import Adapter, Parameter, Variant

_MOST_VARIANTS = 64
_POSITIONS = "cos_sin"  # ends the names of the tables that have a row for each position


def check_files(
    variants: Sequence[Variant],
    parameters_file: str,
    parameters: Sequence[Parameter],
    where: str,
) -> None:
    """Check what a manifest says of its files: plain names, none twice, and no parameter twice.

    Raises
    ------
    ArtefactError
        It does not hold.

    """
    if not 1 <= len(variants) <= _MOST_VARIANTS:
        raise ArtefactError(
            f"{where} lists {len(variants)} variants; 1 to {_MOST_VARIANTS} are allowed."
        )
    files = [v.library.file for v in variants]
    for values in ([v.target.name for v in variants], [*files, parameters_file]):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise ArtefactError(f"{where} names {twice[0]!r} twice.")
    for name in (*files, parameters_file):
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ArtefactError(f"{where} names the file {name!r}, which is not a plain name.")
    if len({p.name for p in parameters}) != len(parameters):
        raise ArtefactError(f"{where} lists a parameter twice.")


def check_adapters(
    adapters: Sequence[Adapter], parameters: Sequence[Parameter], where: str
) -> None:
    """Check that adapters fill the same places with tensors of their own.

    Compiled code reads them as the first adapter's shapes say.

    Raises
    ------
    ArtefactError
        They do not.

    """
    names = [name for adapter in adapters for name in adapter.parameters]
    last = [p.name for p in parameters[len(parameters) - len(names) :]]
    if len({a.name for a in adapters}) != len(adapters) or names != last:
        raise ArtefactError(
            f"{where}: the adapters' parameters are not the last ones, each adapter's in turn; "
            "compile the model again."
        )
    kinds = {p.name: (p.dtype, p.shape) for p in parameters}
    for adapter in adapters:
        first = [kinds[name] for name in adapters[0].parameters]
        if any(dtype not in ("float16", "float32") for dtype, _ in first):
            raise ArtefactError(f"{where}: an adapter's tensors are float16 or float32, no others.")
        if not first or [kinds[name] for name in adapter.parameters] != first:
            raise ArtefactError(
                f"{where}: the adapter {adapter.name!r} has tensors of other shapes than "
                f"{adapters[0].name!r}; compile the model again."
            )


def check_positions(parameters: Sequence[Parameter], context_length: int, where: str) -> None:
    """Check that tables of rotary embeddings have every position: code reads them unchecked.

    Raises
    ------
    ArtefactError
        One has fewer rows than the context has tokens.

    """
    for parameter in parameters:
        rows = parameter.shape[0] if parameter.shape else 0
        if parameter.name.endswith(_POSITIONS) and rows < context_length:
            raise ArtefactError(
                f"{where}: parameter {parameter.name!r} has {rows} rows, fewer than the context "
                f"of {context_length} tokens."
            )
