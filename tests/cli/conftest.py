"""The command line in this process, and a toy artefact for it to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.cli.main import main
from tests.runtime import toy


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("error: ")

    @property
    def json(self) -> Any:
        """Standard output as the one JSON document it must be."""
        return json.loads(self.out)


Gqsa = Callable[..., Outcome]


@pytest.fixture
def gqsa(capfd: pytest.CaptureFixture[str]) -> Gqsa:
    """Return a function that runs `gqsa` with these words."""

    def call(*words: str | Path) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture(scope="session")
def toy_artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled artefact of two random layers."""
    directory = tmp_path_factory.mktemp("cli") / "toy"
    toy.write_artefact(directory)
    return directory
