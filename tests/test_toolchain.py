"""Linkers and native builds: what is found, and what is said where something is missing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gqsa_compiler import bundle, native, toolchain
from gqsa_compiler.artefact import library_name
from gqsa_compiler.cli.app import make_app
from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.targets import parse_target, parse_targets
from gqsa_compiler.toolchain import Linker, find_zig, library_linker, program_linker

PHONE = parse_target("android-arm64")
ARM = parse_target("aarch64")


def _only(monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    """Let nothing but these be on the PATH."""
    monkeypatch.setattr(
        shutil, "which", lambda name, **_: f"/bin/{name}" * (name in programs) or None
    )
    monkeypatch.setattr(toolchain.util, "find_spec", lambda _name: None)
    monkeypatch.delenv("ANDROID_NDK", raising=False)


def test_zig_links_where_there_is_no_cross_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, "aarch64-linux-gnu-g++", "zig")
    assert library_linker(ARM).command[0] == "aarch64-linux-gnu-g++"
    _only(monkeypatch, "zig")
    assert library_linker(ARM).command[:4] == (
        "/bin/zig", "c++", "-target", "aarch64-linux-gnu.2.28",
    )  # fmt: skip
    assert program_linker(PHONE).command[3] == "aarch64-linux-musl"
    _only(monkeypatch)
    with pytest.raises(CompileError, match=r"needs aarch64-linux-gnu-g\+\+ or zig.*ziglang"):
        library_linker(ARM)
    with pytest.raises(CompileError, match=r"android-arm64 needs zig .*ziglang.*ANDROID_NDK"):
        program_linker(PHONE)


def test_zig_of_the_python_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "ziglang"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.syspath_prepend(tmp_path)
    assert find_zig() is None
    (package / "zig").touch()
    assert find_zig() == str(package / "zig")


def test_the_ndk_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _only(monkeypatch, "zig")
    monkeypatch.setenv("ANDROID_NDK", str(tmp_path))
    with pytest.raises(CompileError, match=r"ANDROID_NDK is .* has no toolchains/llvm"):
        program_linker(PHONE)
    tool = tmp_path / toolchain._NDK_TOOL
    tool.parent.mkdir(parents=True)
    tool.touch()
    assert program_linker(PHONE).command[0] == str(tool)
    assert "-static-libstdc++" in program_linker(PHONE).command


def test_what_a_linker_says(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"sh could not link out: it is broken"):
        Linker(("sh", "-c", "echo it is broken >&2; exit 3"))(tmp_path / "out", [])


def test_a_linked_target_is_a_program_of_its_own() -> None:
    assert PHONE.linked
    assert not ARM.linked
    assert library_name(PHONE, 1) == "gqsa-run"
    assert PHONE.required_flags == ARM.required_flags
    with pytest.raises(UsageError, match="android-arm64 is a program of its own"):
        parse_targets("aarch64,android-arm64")


def test_a_missing_native_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GQSA_NATIVE", str(tmp_path))
    monkeypatch.setattr(bundle, "program_linker", lambda _target: None)
    monkeypatch.setattr(bundle, "library_linker", lambda _target: None)
    with pytest.raises(CompileError, match="make it with: gqsa native android-arm64"):
        bundle.check_tools(PHONE, bundle=False)
    (tmp_path / "android-arm64" / "linked").mkdir(parents=True)
    bundle.check_tools(PHONE, bundle=True)
    with pytest.raises(CompileError, match="incomplete; repeat: gqsa native android-arm64"):
        bundle.link_program(PHONE, [], tmp_path / "out")


def test_where_builds_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GQSA_NATIVE", str(tmp_path))
    assert native.native_folder("aarch64") == tmp_path / "aarch64"
    assert not native.is_built("aarch64")
    (tmp_path / "aarch64").mkdir()
    (tmp_path / "aarch64" / "gqsa-run").touch()
    assert native.is_built("aarch64")
    monkeypatch.delenv("GQSA_NATIVE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = native.native_folder("x86_64")
    assert folder.parent.parent == tmp_path / "cache" / "gqsa" / "native"
    assert "-tvm0.27" in folder.parent.name


def test_gqsa_native(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GQSA_NATIVE", str(tmp_path / "builds"))
    done = CliRunner().invoke(make_app(), ["native", "vax"])
    assert done.exit_code == 2
    assert "choose one of x86_64, aarch64, android-arm64" in done.output
    # A source folder whose script notes what it was called with.
    script = tmp_path / "build.sh"
    script.write_text('mkdir -p "$3"; echo "$1" > "$3/gqsa-run"; [ "$1" = x86_64 ]\n')
    monkeypatch.setattr(native, "source_folder", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert CliRunner().invoke(make_app(), ["native", "x86_64"]).exit_code == 0
    assert (tmp_path / "builds" / "x86_64" / "gqsa-run").read_text() == "x86_64\n"
    failed = CliRunner().invoke(make_app(), ["native", "aarch64"])
    assert failed.exit_code == 1
    assert "for aarch64 failed" in failed.output
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(CompileError, match="needs sh"):
        native.build("x86_64")


def test_the_scripts_are_sound() -> None:
    for script in native.source_folder().glob("*.sh"):
        subprocess.run(["sh", "-n", str(script)], check=True)
