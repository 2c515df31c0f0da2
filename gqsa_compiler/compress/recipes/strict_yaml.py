"""Small YAML files of plain settings, read strictly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from gqsa_compiler.errors import UsageError

MAX_BYTES = 64 * 1024
"""A longer file holds no settings."""

MAX_DEPTH = 8
"""Lists and mappings inside each other. Reading a thousand of them would take minutes."""

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]+", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Scalars are those of YAML 1.2. In version 1.1, which PyYAML constructs, ``2:4`` is the number
    124, ``5e-3`` is a text and ``off`` is false. Anchors, aliases and tags are refused: settings
    need none, and a few lines of aliases can stand for gigabytes.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict
        Of None, bool, int, float, str, lists and mappings with texts as keys.

    Raises
    ------
    UsageError
        The file cannot be read, is too long, or is not such a file.
    """
    if not path.is_file():
        raise UsageError(f"The file {path} does not exist or is not a file.")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"The file {path} cannot be read: {error.strerror}.") from error
    if len(raw) > MAX_BYTES:
        raise UsageError(f"The file {path} is longer than {MAX_BYTES} bytes: it is no recipe.")
    try:
        text = raw.decode("utf-8")
        _check_events(text)
        node = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"The file {path} is not a mapping of settings (key: value a line).")
        return _mapping(node)
    except UnicodeDecodeError as error:
        raise UsageError(f"The file {path} is not UTF-8 text ({error}).") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"The file {path} is not valid{place}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"The file {path} is not valid YAML: {reason}.") from error


def _check_events(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        problem = None
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            problem = "too many lists or settings inside each other"
        elif isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases are not allowed"
        elif getattr(event, "tag", None) is not None:
            problem = "tags are not allowed"
        if problem is not None:
            raise _problem(problem, event)


def _problem(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    text: str = node.value
    if node.style is not None:  # quoted
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def _mapping(node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in node.value:
        problem = None
        if not isinstance(key, yaml.ScalarNode):
            problem = "a key is not a word"
        elif key.value in result:
            problem = f"the key {key.value!r} stands there twice"
        if problem is not None:
            raise _problem(problem, key)
        result[key.value] = _value(value)
    return result
