"""Recipes as YAML files, and as plain data that gives back exactly the same recipe."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gqsa_compiler.compress.recipes.budget import Budget, parse_budget
from gqsa_compiler.compress.recipes.presets import default_stages, parse_recipe, with_stages
from gqsa_compiler.compress.recipes.recipe import STAGES, BlockStage, Head, ModelStage, Recipe
from gqsa_compiler.compress.recipes.strict_yaml import read_settings
from gqsa_compiler.errors import UsageError

SUFFIXES = (".yaml", ".yml")
"""What the names of recipe files end in."""

_REQUIRED = ("bits", "sparsity_percent", "group_size")
_Settings = TypeVar("_Settings", BlockStage, ModelStage, Head)
_HINTS: dict[type, dict[str, Any]] = {
    cls: get_type_hints(cls) for cls in (BlockStage, ModelStage, Budget, Head)
}
_HINTS[Recipe] = get_type_hints(Recipe, localns={"Budget": Budget})
_GROUPS: dict[str, type] = {
    "block": BlockStage,
    "weights": ModelStage,
    "scales": ModelStage,
    "head": Head,
}
"""The settings that have settings of their own."""
_WORDS = {int: "a whole number", float: "a number", str: "a text"}


def load_recipe(text: str, stages: Sequence[str] | None = None) -> Recipe:
    """Read a recipe by its name, or from a YAML file (docs/recipes.md).

    Parameters
    ----------
    text : str
        What `parse_recipe` takes, or the path of a file that ends in .yaml or .yml.
    stages : sequence of str, optional
        The training stages to run instead of the recipe's own, as in `parse_recipe`. Those that a
        file has settings for run with these.

    Raises
    ------
    UsageError
        There is no such recipe, or the file holds something else than a recipe.
    """
    if not text.lower().endswith(SUFFIXES):
        return parse_recipe(text, stages)
    path = Path(text)
    recipe = _from_settings(read_settings(path), path)
    return recipe if stages is None else with_stages(recipe, stages)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return all of a recipe as JSON types; `recipe_from_dict` gives back an equal one."""
    result: dict[str, Any] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, Budget):
            value = value.to_dict()
        elif isinstance(value, (BlockStage, ModelStage, Head)):
            hints = _HINTS[type(value)]
            # 2 and 2.0 are the same setting, so their records are too.
            value = {
                name: float(number) if hints[name] is float else number
                for name, number in asdict(value).items()
            }
        result[field.name] = value
    return result


def recipe_from_dict(values: Mapping[str, Any], where: str = "The recipe") -> Recipe:
    """Return the recipe of which `recipe_to_dict` gave `values`.

    Parameters
    ----------
    values : mapping
    where : str
        Where it stands, for errors.

    Raises
    ------
    UsageError
        A key is missing or unknown, or a value is not one of a recipe.
    """
    _check_keys(values, _HINTS[Recipe], where)
    _check_all(values, _HINTS[Recipe], where)
    read: dict[str, Any] = {}
    for key, value in values.items():
        place = f"{where}: {key}"
        if key in _GROUPS and value is not None:
            kind = _GROUPS[key]
            settings = _group_settings(kind, value, place)
            _check_all(settings, _HINTS[kind], place)
            read[key] = _made(partial(kind, **settings), place)
        elif key == "budget":
            read[key] = _budget(value, place)
        else:
            read[key] = _typed(value, _HINTS[Recipe][key], place)
    return _made(partial(Recipe, **read), where)


def _from_settings(values: dict[str, Any], path: Path) -> Recipe:
    """Make a file's recipe: its base, or nothing, with the file's settings."""
    where = str(path)
    hints = _HINTS[Recipe]
    _check_keys(values, [*hints, "base"], where)
    plain = {
        key: _typed(value, hints[key], f"{where}: {key}")
        for key, value in values.items()
        if key not in ("base", "budget", *_GROUPS)
    }
    plain.setdefault("name", path.stem)
    if "base" in values:
        base = _made(partial(parse_recipe, _typed(values["base"], str, f"{where}: base")), where)
        # Stages come last: some settings need others of the stages.
        kept = {stage: getattr(base, stage) for stage in STAGES}
        recipe = _made(partial(replace, base.one_shot(), **plain), where)
    else:
        missing = [key for key in _REQUIRED if key not in values]
        if missing:
            raise UsageError(
                f"{where} lacks the key {missing[0]!r}; give it, or a base such as base: w4s50g16."
            )
        kept = dict.fromkeys(STAGES)
        recipe = _made(partial(Recipe, **plain), where)
    if "budget" in values:
        budget = _budget(values["budget"], f"{where}: budget")
        recipe = _made(partial(replace, recipe, budget=budget), where)
    if "head" in values:
        head = _group(recipe.head or Head(), values["head"], f"{where}: head")
        recipe = _made(partial(replace, recipe, head=head), where)
    defaults = default_stages()
    for stage in STAGES:
        if stage in values:
            start = kept[stage] or getattr(defaults, stage)
            kept[stage] = _group(start, values[stage], f"{where}: {stage}")
    return _made(partial(replace, recipe, **kept), where)


def _group(start: _Settings, value: Any, where: str) -> _Settings | None:
    """Return settings on top of those they start from; None if they are switched off."""
    if value is None:
        return None
    settings = _group_settings(type(start), value, where)
    return _made(partial(replace, start, **settings), where)


def _group_settings(kind: type, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        without = "a head that is left as it is" if kind is Head else "no such stage"
        raise UsageError(
            f"{where} must be settings (key: value), {{}} for the default ones, or null for "
            f"{without}, not {_shown(value)}."
        )
    hints = _HINTS[kind]
    _check_keys(value, hints, where)
    return {key: _typed(item, hints[key], f"{where}.{key}") for key, item in value.items()}


def _budget(value: Any, where: str) -> Budget | None:
    if value is None:
        return None
    if isinstance(value, str):
        return _made(partial(parse_budget, value), where)
    if not isinstance(value, Mapping):
        raise UsageError(
            f"{where} must be a size such as 3.1bits or 60MB, or settings, not {_shown(value)}."
        )
    hints = _HINTS[Budget]
    _check_keys(value, hints, where)
    settings = {key: _typed(item, hints[key], f"{where}.{key}") for key, item in value.items()}
    return _made(partial(Budget.from_dict, settings), where)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as a setting's type, or raise; a whole number is a number too."""
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{where} must be a list, not {_shown(value)}.")
        return tuple(_typed(item, get_args(hint)[0], where) for item in value)
    kind = str if get_origin(hint) is Literal else hint
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{where} must be {_WORDS[kind]}, not {_shown(value)}.")
    return value


def _check_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f"did you mean {close[0]}" if close else f"known are {', '.join(known)}"
            raise UsageError(f"{where} has an unknown key {_shown(key)}; {hint}.")


def _check_all(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    missing = [key for key in known if key not in values]
    if missing:
        raise UsageError(f"{where} lacks the key {missing[0]!r}.")


_T = TypeVar("_T")


def _made(make: Callable[[], _T], where: str) -> _T:
    """Return what `make` makes; its errors name the place."""
    try:
        return make()
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _shown(value: Any) -> str:
    """Show a value in an error, shortly."""
    if isinstance(value, (Mapping, list, tuple)):
        return "a list" if not isinstance(value, Mapping) else "settings"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
