"""Commands in the documentation are commands that the program takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from gqsa_compiler.cli.app import make_app, make_compile_app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/*.md")
_BLOCK = re.compile(r"^```(?:\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _commands() -> Iterator[tuple[str, list[str]]]:
    """Yield (document, words) for every `gqsa ...` line of a code block."""
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            for block in _BLOCK.findall(path.read_text(encoding="utf-8")):
                for line in block.replace("\\\n", " ").splitlines():
                    text = line.strip().removeprefix("$ ")
                    if re.match(r"gqsa(-compile)? ", text):
                        words = shlex.split(text, comments=True)
                        cut = [i for i, word in enumerate(words) if word in ("|", ">", "2>", "<")]
                        yield path.name, words[: cut[0]] if cut else words


@pytest.mark.parametrize(("document", "words"), list(_commands()), ids=str)
def test_command_line_parses(document: str, words: list[str]) -> None:
    group = typer.main.get_command(make_app())
    if words[0] == "gqsa-compile":
        verb, rest = typer.main.get_command(make_compile_app()), words[1:]
    else:
        if words[1].startswith("-"):
            assert words[1] in ("--help", "--version")
            return
        verb, rest = group.commands[words[1]], words[2:]  # type: ignore[attr-defined]
    if "--help" not in rest:
        verb.make_context(words[0], rest)


def test_the_readme_shows_every_verb() -> None:
    shown = {words[1] for document, words in _commands() if document == "README.md"}
    group = typer.main.get_command(make_app())
    assert set(group.commands) <= shown  # type: ignore[attr-defined]


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)?)`", path.read_text()))
            assert named <= targets, f"{path.name}: {named - targets}"
