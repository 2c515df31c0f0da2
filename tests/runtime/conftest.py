"""One toy artefact for the whole run; tests that damage one work on a copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gqsa_compiler.runtime.model import Model, load
from tests.runtime import toy

Arrays = list[tuple[str, np.ndarray]]


@pytest.fixture(scope="session")
def toy_artefact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arrays]:
    directory = tmp_path_factory.mktemp("toy") / "toy.gqsa"
    return directory, toy.write_artefact(directory)


@pytest.fixture(scope="session")
def artefact(toy_artefact: tuple[Path, Arrays]) -> Path:
    return toy_artefact[0]


@pytest.fixture(scope="session")
def arrays(toy_artefact: tuple[Path, Arrays]) -> Arrays:
    return toy_artefact[1]


@pytest.fixture
def copy(artefact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artefact, tmp_path / "copy.gqsa"))


@pytest.fixture(scope="session")
def model(artefact: Path) -> Iterator[Model]:
    with load(artefact) as model:
        yield model
