from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqsa_compiler.runtime import library
from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.gpus import CUDA
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.model import load
from gqsa_compiler.runtime.program import Program
from gqsa_compiler.runtime.schema import Target
from tests.runtime.toy import edit_manifest

TARGET = Target("x86-64-v4", "llvm", platform.machine(), ("avx2", "avx512f"), 1, "")


def target(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what the only variant was compiled for."""
    found: dict[str, Any] = manifest["variants"][0]["target"]
    return found


def code(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the only variant's library."""
    found: dict[str, Any] = manifest["variants"][0]["library"]
    return found


def write_cpuinfo(directory: Path, flags: str) -> Path:
    path = directory / "cpuinfo"
    path.write_text(f"processor\t: 0\n{flags}\nprocessor\t: 1\n{flags}\n")
    return path


def test_cpu_flags(tmp_path: Path) -> None:
    library.check_target(TARGET, write_cpuinfo(tmp_path, "flags\t\t: avx2 avx512f sse2"))
    library.check_target(TARGET, write_cpuinfo(tmp_path, "Features\t: avx2 avx512f"))
    words = r"compiled for x86-64-v4 .* this machine lacks avx512f; compile it again with --target"
    with pytest.raises(ArtefactError, match=words):
        library.check_target(TARGET, write_cpuinfo(tmp_path, "flags\t\t: avx2 avx512_vnni"))


def test_a_system_that_tells_no_flags_is_believed(tmp_path: Path) -> None:
    library.check_target(TARGET, tmp_path / "nothing")
    library.check_target(TARGET, write_cpuinfo(tmp_path, "model name : x"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: target(m).update(arch="sparc64"), r"\(sparc64\) and this machine is"),
        (
            lambda m: target(m).update(device_type=4, kind="opencl"),
            r"\(opencl\), which this release",
        ),
        (lambda m: target(m).update(flags=["avx9000"]), "this machine lacks avx9000"),
        (lambda m: m["versions"].update(tvm="0.26.0"), "apache-tvm 0.26.0 and .* is installed"),
        (lambda m: m["versions"].update(tvm_ffi="0.2.0"), "apache-tvm-ffi==0.2.0 or compile again"),
        (lambda m: m["versions"].update(tvm_ffi="0.1.999"), "apache-tvm-ffi 0.1.999 and"),
        (lambda m: m["versions"].update(tvm_ffi="?"), r"apache-tvm-ffi \? and"),
        (lambda m: code(m).update(sha256="00"), r"model\.so is damaged"),
        (lambda m: code(m).update(file="other.so"), r"there is no .*other\.so"),
        (lambda m: m["parameters"][0].update(sha256="00"), r"embed\.weight in .* is damaged"),
        (lambda m: m["parameters"][0].update(name="x"), "has no parameter x"),
        (lambda m: m.update(parameters_file="other"), r"there is no .*other"),
    ],
)
def test_refused_before_anything_is_loaded(
    copy: Path,
    change: Callable[[dict[str, Any]], Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a library was loaded")

    monkeypatch.setattr(library, "load_executable", refuse)
    edit_manifest(copy, change)
    with pytest.raises(ArtefactError, match=words):
        load(copy)


def test_post_releases_and_older_ffi_patches_are_the_same(copy: Path) -> None:
    manifest = Manifest.read(copy)
    library.check_ffi("0.1.15")
    edit_manifest(copy, lambda m: m["versions"].update(tvm="0.27.0.post9"))
    assert library.find_runtime(copy, manifest)[0].name == "libtvm_runtime.so"


def test_bundle_comes_first(copy: Path) -> None:
    manifest = Manifest.read(copy)
    (copy / library.BUNDLE).mkdir()
    (copy / library.BUNDLE / library.RUNTIME_LIBRARIES[0]).touch()
    with pytest.raises(ArtefactError, match=r"incomplete: there is no .*runtime_extra\.so"):
        library.find_runtime(copy, manifest)
    (copy / library.BUNDLE / library.RUNTIME_LIBRARIES[1]).touch()
    assert {p.parent for p in library.find_runtime(copy, manifest)} == {copy / "lib"}


def test_a_bundle_s_library_for_gpus_is_checked(copy: Path) -> None:
    """Whatever is to be loaded has its hash in the bundle."""
    edit_manifest(copy, lambda m: target(m).update(device_type=CUDA, kind="cuda"))
    manifest = Manifest.read(copy)
    variant, bundle = manifest.variants[0], copy / library.BUNDLE
    names = [*library.RUNTIME_LIBRARIES, library.CUDA_LIBRARY]
    bundle.mkdir()
    for name in names:
        (bundle / name).write_text(name)
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    sums = [f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True)]
    (bundle / library.SUMS).write_text("".join(sums))
    assert library.check(copy, manifest, variant) == [bundle / name for name in names]
    (bundle / library.CUDA_LIBRARY).write_text("another")
    with pytest.raises(ArtefactError, match=r"runtime_cuda\.so is damaged: .* in SHA256SUMS; copy"):
        library.check(copy, manifest, variant)
    (bundle / library.CUDA_LIBRARY).unlink()
    with pytest.raises(ArtefactError, match=r"incomplete: there is no .*runtime_cuda\.so"):
        library.check(copy, manifest, variant)


def test_no_tvm_and_no_bundle(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(copy)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArtefactError, match=r"install apache-tvm==.* or compile with --bundle"):
        library.find_runtime(copy, manifest)
    with pytest.raises(ArtefactError, match="gqsa-no-such-package is not installed"):
        library._installed("gqsa-no-such-package")


def test_code_that_is_no_library(copy: Path) -> None:
    path = copy / "model.so"
    path.write_bytes(b"not ELF")
    with pytest.raises(ArtefactError, match=r"model\.so cannot be loaded"):
        library.load_executable([], path, version("apache-tvm"))


def test_library_without_the_functions(copy: Path) -> None:
    """A real shared library that is not ours: one of numpy's serves."""
    shutil.copy(np.linalg._umath_linalg.__file__, copy / "model.so")
    digest = hashlib.sha256((copy / "model.so").read_bytes()).hexdigest()
    edit_manifest(copy, lambda m: code(m).update(sha256=digest))
    with pytest.raises(ArtefactError, match="library is not a compiled model: Module has no"):
        load(copy)


def bundle_another_release(directory: Path) -> None:
    """Make an artefact of TVM 0.26, with a bundle; its libraries must not even be opened."""
    edit_manifest(directory, lambda m: m["versions"].update(tvm="0.26.1"))
    (directory / library.BUNDLE).mkdir()
    for name in library.RUNTIME_LIBRARIES:
        (directory / library.BUNDLE / name).touch()


def test_a_bundle_of_another_release_than_the_imported_tvm(copy: Path) -> None:
    """The tests have imported tvm: the bundle's runtime can no longer be loaded."""
    bundle_another_release(copy)
    words = r"compiled with apache-tvm 0\.26\.1 and this process has loaded the TVM runtime 0\.27"
    with pytest.raises(ArtefactError, match=words):
        load(copy)


def test_a_runtime_whose_version_nobody_knows(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "tvm")
    with pytest.raises(ArtefactError, match="TVM runtime of unknown version already"):
        library.load_executable([], artefact / "model.so", version("apache-tvm"))


def test_artefacts_of_one_process_share_a_release(artefact: Path, copy: Path) -> None:
    """Without `import tvm`: the first artefact's runtime serves the second or refuses it."""
    bundle_another_release(copy)
    code = (
        "from gqsa_compiler import runtime\n"
        f"for path in ({str(artefact)!r}, {str(artefact)!r}, {str(copy)!r}):\n"
        "    try:\n"
        "        print(runtime.load(path, threads=1).generate('the', max_tokens=2).prompt_tokens)\n"
        "    except runtime.ArtefactError as error:\n"
        "        print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    first, second, third = result.stdout.splitlines()
    assert first == second == "1"
    assert "0.26.1 and this process has loaded the TVM runtime 0.27" in third


def test_loading_imports_no_compiler(artefact: Path) -> None:
    """TVM's Python package stays out, and so do torch and transformers."""
    code = (
        "import sys; from gqsa_compiler import runtime\n"
        f"print(runtime.load({str(artefact)!r}).generate('the man', max_tokens=3).token_ids)\n"
        "print(sorted({'tvm', 'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[1] == "[]"


def test_errors_import_nothing_else() -> None:
    code = (
        "import sys, gqsa_compiler.runtime.errors, gqsa_compiler.runtime.manifest\n"
        "print(sorted({'numpy', 'tvm_ffi', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    from gqsa_compiler import runtime

    for name in runtime.__all__:
        assert getattr(runtime, name).__name__ == name
    assert dir(runtime) == sorted(runtime.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = runtime.nothing


def test_versions_in_the_manifest_are_the_installed_ones(artefact: Path) -> None:
    manifest = Manifest.read(artefact)
    assert manifest.versions.tvm == version("apache-tvm")
    assert Program(artefact, manifest).manifest is manifest
