"""What `--bundle` adds to an artefact: all that a machine with nothing installed needs."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

from gqsa_compiler.errors import CompileError, GqsaError
from gqsa_compiler.native import PROGRAM, native_folder
from gqsa_compiler.runtime.chat import TEMPLATE_FILE, load_template
from gqsa_compiler.runtime.library import BUNDLE, CUDA_LIBRARY, RUNTIME_LIBRARIES, SUMS
from gqsa_compiler.schedules.cuda.nvcc import find_nvcc
from gqsa_compiler.targets import TargetSpec, host_arch
from gqsa_compiler.toolchain import ANDROID, LINKED, library_linker, package_folder, program_linker

CHAT_PROMPT = "chat_prompt.json"


def check_tools(target: TargetSpec, *, bundle: bool) -> None:
    """Check, before any work, that this machine can link for a target and bundle libraries.

    Raises
    ------
    CompileError
        No linker for the target, or no native build for it.
    """
    if target.linked:
        program_linker(target)
        folder = native_folder(ANDROID) / LINKED
        if not folder.is_dir():
            raise CompileError(
                f"Code for {target.name} is linked into the native program, and there is no "
                f"{folder}; make it with: gqsa native {ANDROID}"
            )
        return
    if target.kind == "cuda":
        find_nvcc()
    arch = target.machine
    if bundle and (arch != host_arch() or sys.platform != "linux"):
        folder = native_folder(arch) / BUNDLE
        if not folder.is_dir():
            raise CompileError(
                f"--bundle needs the runtime libraries for {arch}, and there is no {folder}; make "
                f"it with: gqsa native {arch} (or compile without --bundle)."
            )
    library_linker(target)


def link_program(target: TargetSpec, objects: list[str], output: Path) -> None:
    """Link a model's objects with the native runtime and TVM's into one program.

    Raises
    ------
    CompileError
        The linker failed.
    """
    archives = sorted((native_folder(ANDROID) / LINKED).glob("*.a"))
    whole = [str(archive) for archive in archives if archive.name == "libgqsa-linked.a"]
    others = [str(archive) for archive in archives if archive.name != "libgqsa-linked.a"]
    if not whole:
        raise CompileError(f"The native build is incomplete; repeat: gqsa native {ANDROID}")
    program_linker(target)(
        output, [*objects, "-Wl,--whole-archive", *whole, "-Wl,--no-whole-archive", *others]
    )


def add_bundle(directory: Path, target: TargetSpec) -> None:
    """Put into an artefact what runs it on a machine that has nothing installed.

    These are TVM's runtime libraries for the artefact's code with their SHA-256 sums, the program
    ``gqsa-run`` if it has been built (of a linked target it is there already), and, for its
    ``--chat``, what the chat template writes around a message.

    Raises
    ------
    CompileError
        A library is not there.
    """
    if not target.linked:
        _add_libraries(directory, target)
    prompt = chat_prompt(directory)
    if prompt is not None:
        text = json.dumps(prompt, indent=1, ensure_ascii=False)
        (directory / CHAT_PROMPT).write_text(text + "\n", encoding="utf-8")


def _add_libraries(directory: Path, target: TargetSpec) -> None:
    arch, on_gpu = target.machine, target.kind == "cuda"
    native = native_folder(arch)
    if arch == host_arch():
        places = [package_folder(p) / "lib" for p in ("tvm", "tvm_ffi")]
    else:
        places = [native / BUNDLE]
    library = directory / BUNDLE
    library.mkdir()
    sums = []
    names = (*RUNTIME_LIBRARIES, *([CUDA_LIBRARY] if on_gpu else []), "libtvm_ffi.so")
    for name in names:
        found = [place / name for place in places if (place / name).is_file()]
        if not found:
            raise CompileError(f"{name} is not in {places[0]}; install it there again.")
        shutil.copy2(found[0], library / name)
        sums.append(f"{hashlib.sha256((library / name).read_bytes()).hexdigest()}  {name}\n")
    (library / SUMS).write_text("".join(sums), encoding="ascii")
    if (native / PROGRAM).is_file() and not on_gpu:  # it drives CPUs only
        shutil.copy2(native / PROGRAM, directory / PROGRAM)


def chat_prompt(directory: Path) -> dict[str, str | bool] | None:
    """Find what an artefact's chat template writes around one message of a user.

    Parameters
    ----------
    directory : Path
        With the model's chat_template.jinja and tokenizer_config.json, if it has them.

    Returns
    -------
    dict or None
        ``before`` and ``after`` the message, and whether its white space is cut off (``trim``);
        None if there is no template, or one that does more to a message, or tells the date.
    """
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        source = (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    template = load_template(directory, settings)
    if template is None or "strftime_now" in source:
        return None
    mark = "a message of nobody's"

    def render(content: str) -> str:
        return template.render([{"role": "user", "content": content}])

    try:
        text, spaced = render(mark), render(f" {mark} ")
    except GqsaError:
        return None
    if text.count(mark) != 1:
        return None
    before, after = text.split(mark)
    if spaced not in (text, f"{before} {mark} {after}"):
        return None
    return {"before": before, "after": after, "trim": spaced == text}
