"""Artefacts with code for several targets: which of it runs, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.runtime import library
from gqsa_compiler.runtime.cpus import host_arch
from gqsa_compiler.runtime.errors import ArtefactError, UsageError
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.model import load
from tests.runtime.toy import edit_manifest

OLD, NEW = ["fpu"], ["fpu", "wide"]
OTHER_ARCH = "aarch64" if host_arch() == "x86_64" else "x86_64"


@pytest.fixture
def two(copy: Path) -> Path:
    """Return an artefact with the same code twice: for a new machine, and for an old one."""
    shutil.copy(copy / "model.so", copy / "model.new.so")
    edit_manifest(copy, _double)
    return copy


def _double(manifest: dict[str, Any]) -> None:
    (variant,) = manifest["variants"]
    target, code = variant["target"], variant["library"]
    manifest["variants"] = [
        {
            "target": {**target, "name": "new", "flags": NEW},
            "library": {**code, "file": "model.new.so"},
        },
        {"target": {**target, "name": "old", "flags": OLD}, "library": code},
    ]


def cpuinfo(directory: Path, flags: str) -> Path:
    path = directory / "cpuinfo"
    path.write_text(f"flags\t\t: {flags}\n")
    return path


def chosen(directory: Path, flags: str, name: str | None = None) -> str:
    manifest = Manifest.read(directory)
    return library.choose(manifest, name, cpuinfo(directory, flags)).target.name


def test_the_first_that_runs_here_is_chosen(two: Path) -> None:
    assert chosen(two, "fpu wide more") == "new"
    assert chosen(two, "fpu more") == "old"
    assert chosen(two, "fpu wide", "old") == "old"


def test_a_system_that_tells_nothing_gets_what_asks_for_least(two: Path) -> None:
    assert library.choose(Manifest.read(two), None, two / "nothing").target.name == "old"


def test_where_none_runs_the_least_demanding_says_what_it_lacks(two: Path) -> None:
    with pytest.raises(ArtefactError, match=r"compiled for old .* this machine lacks fpu; compile"):
        chosen(two, "wide")
    edit_manifest(two, lambda m: [v["target"].update(arch=OTHER_ARCH) for v in m["variants"]])
    with pytest.raises(ArtefactError, match=rf"compiled for old \({OTHER_ARCH}\) and this machine"):
        chosen(two, "fpu wide")


def test_a_variant_of_ones_own_choice(two: Path) -> None:
    with pytest.raises(ArtefactError, match=r"compiled for new .* this machine lacks wide"):
        chosen(two, "fpu", "new")
    with pytest.raises(UsageError, match="no code for 'newer'; choose one of new, old"):
        chosen(two, "fpu", "newer")


def test_the_model_says_what_runs(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, name in ((OLD, "old"), (NEW, "new")):
        monkeypatch.setattr(library, "host_flags", lambda _path, flags=flags: frozenset(flags))
        with load(two) as model:
            assert model.variant == name
    with load(two, variant="old") as model:
        assert model.variant == "old"


def test_only_the_chosen_library_has_to_be_whole(two: Path) -> None:
    edit_manifest(two, lambda m: [v["target"].update(flags=[]) for v in m["variants"]])
    (two / "model.new.so").write_bytes(b"\x7fELF")
    with pytest.raises(ArtefactError, match=r"model\.new\.so is damaged: its SHA-256"):
        load(two)
    with load(two, variant="old") as model:
        assert model.generate("the", max_tokens=2).prompt_tokens == 1
    (two / "model.new.so").unlink()
    with pytest.raises(ArtefactError, match=r"incomplete: there is no .*model\.new\.so"):
        load(two)
