"""Tiny dense models, each built once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import build_model, load_parameters
from tests.tiny_models import make_tiny

Dense = Callable[..., Any]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """Return what makes a dense float32 model of a family, to change at will."""
    made: dict[str, Any] = {}

    def build(family: str, **overrides: Any) -> Any:
        key = f"{family} {overrides}"
        if key not in made:
            path = make_tiny(family, tmp_path_factory.mktemp("dense") / family, **overrides)
            source = resolve(str(path))
            made[key] = build_model(source)
            load_parameters(made[key], "", source)
        return copy.deepcopy(made[key])

    return build
